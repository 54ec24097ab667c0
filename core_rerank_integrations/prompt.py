"""The prompt of arXiv 2510.02219: its text, its tokens, and where documents and query lie in it.

Nothing here knows a model or a framework; a tokenizer is all it takes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from core_rerank_integrations.errors import InvalidInputError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

INTRODUCTION = " Here are some paragraphs:\n\n"
INSTRUCTION = (
    "Please find information that are relevant to the following query in the paragraphs above."
    "\n\nQuery: "
)
BASELINE_QUERY = "N/A"
BORDER_TOKENS = 8
"""Most tokens that a passage may hold beyond its length: characters at its ends are kept whole."""

TokenIds = npt.NDArray[np.int64]

_SURROGATES = re.compile("[\ud800-\udfff]")


class Span(NamedTuple):
    """Tokens ``start`` to ``stop - 1`` of a prompt, or characters of a text."""

    start: int
    stop: int


@dataclass(frozen=True)
class PromptTemplate:
    """What stands around the user's message.

    Attributes:
        name: Under this name a template of this package can be asked for.
        prefix: What opens the user's turn.
        suffix: What closes it, and opens the assistant's.
    """

    name: str
    prefix: str
    suffix: str

    @classmethod
    def from_chat(cls, render: Callable[[str], str], name: str = "chat") -> PromptTemplate:
        """Derive the pair from a chat template.

        Args:
            render: Renders one user message, with the assistant's turn opened, to text.

        Raises:
            InvalidInputError: The template drops, repeats or changes the user's message.
        """
        marker = "CORE-RERANK-USER-MESSAGE"
        prefix, found, suffix = render(marker).partition(marker)
        if not found or marker in suffix:
            raise InvalidInputError(
                "the model's chat template does not show the user's message exactly once; "
                "pass template=PromptTemplate(name, prefix, suffix) instead"
            )
        return cls(name, prefix, suffix)


TEMPLATES = {
    template.name: template
    for template in (
        PromptTemplate(
            "granite",
            "<|start_of_role|>user<|end_of_role|>",
            "<|end_of_text|><|start_of_role|>assistant<|end_of_role|>",
        ),
        PromptTemplate(
            "llama-3",
            "<|start_header_id|>user<|end_header_id|>",
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>",
        ),
        PromptTemplate("mistral", "[INST]", "[/INST]"),
        PromptTemplate(
            "phi-4",
            "<|im_start|>user<|im_sep|>",
            "<|im_end|><|im_start|>assistant<|im_sep|>",
        ),
        PromptTemplate("chatml", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
        PromptTemplate("plain", "", "\n"),
    )
}


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt as the model sees it, up to the end of the query span.

    Attributes:
        prefix: Token ids before the query span, shape [prefix tokens]. The same for every
            query over the same documents.
        suffix: Token ids of the query span, shape [query tokens]: the late instruction, the
            query, and the token that follows it.
        document_spans: The tokens of each document and the one token after them. The last
            span may end with the first token of the suffix (see `PromptEncoder.encode`).
        instruction: How many tokens of the suffix come before the query. They and the prefix are
            the same whatever is asked.
        document_starts: Per document, the character of its text that each token of its span
            begins at, shape [tokens]; its length for tokens that begin behind it.
    """

    prefix: TokenIds
    suffix: TokenIds
    document_spans: tuple[Span, ...]
    instruction: int = 0
    document_starts: tuple[npt.NDArray[np.int64], ...] = ()

    def __len__(self) -> int:
        return len(self.prefix) + len(self.suffix)

    @property
    def documents_stop(self) -> int:
        """How many of the prompt's tokens come before the end of the last document's span."""
        return max(span.stop for span in self.document_spans)


class PromptEncoder:
    """Turns a query and its documents into token ids and spans. Safe to share over threads.

    Args:
        tokenizer: The model's own tokenizer; it is copied, never changed.
        template: The turn markers around the prompt. Their special tokens are the only ones a
            prompt ever holds: the same characters in a document or a query stay characters.
    """

    def __init__(self, tokenizer: Tokenizer, template: PromptTemplate) -> None:
        self.template = template
        self._tokenizer = _unpadded_copy(tokenizer)
        self._plain = _unpadded_copy(tokenizer)
        self._plain.encode_special_tokens = True
        self._special_ids = np.array(
            [
                token_id
                for token_id, token in tokenizer.get_added_tokens_decoder().items()
                if token.special
            ],
            dtype=np.int64,
        )

    def encode(self, query: str, documents: Sequence[str]) -> Prompt:
        """Render, tokenise once, and locate the spans by character offsets.

        A document's span starts at its first token and ends with the first token that begins
        at or after its last character, as in the authors' code. The query span starts at the
        first token that begins after the newline closing the last document. That agrees with
        the authors' count of the tokens of a cut-off prompt where a tokenizer joins both
        newlines when nothing follows (byte-level BPE); where newlines are tokens of their own
        (SentencePiece) it is one token earlier, the second newline. When punctuation and
        newlines share a token, the query span's first token is also the one after the last
        document and counts for both, as it does in the authors' code.
        """
        parts = [self.template.prefix, INTRODUCTION]
        length = sum(map(len, parts))
        bounds: list[tuple[int, int]] = []
        for number, document in enumerate(documents, start=1):
            marker, text = f"[document {number}]", f" {_encodable(document)}"
            start = length + len(marker)
            bounds.append((start, start + len(text)))
            parts += (marker, text, "\n\n")
            length = bounds[-1][1] + 2
        query_text = _encodable(query.strip())
        query_start = length + len(INSTRUCTION)
        query_end = query_start + len(query_text)
        parts += (INSTRUCTION, query_text, self.template.suffix)

        ids, starts = self._tokenise("".join(parts), [*bounds, (query_start, query_end)])

        first_query_token = int(np.searchsorted(starts, bounds[-1][1] + 1))
        stop = min(int(np.searchsorted(starts, query_end)) + 1, len(ids))
        spans = tuple(
            Span(int(np.searchsorted(starts, start)), int(np.searchsorted(starts, end)) + 1)
            for start, end in bounds
        )
        # The space in front of a document is not its own.
        document_starts = tuple(
            np.clip(starts[span.start : span.stop] - start - 1, 0, end - start - 1)
            for span, (start, end) in zip(spans, bounds, strict=True)
        )
        # The space before the query goes with its first token, or is one of its own.
        instruction_stop = int(np.searchsorted(starts, query_start - 1))
        return Prompt(
            ids[:first_query_token],
            ids[first_query_token:stop],
            spans,
            max(instruction_stop - first_query_token, 0),
            document_starts,
        )

    def document_lengths(self, documents: Sequence[str]) -> list[int]:
        """Tokens each document adds to a prompt, its marker and closing newlines included.

        Neighbouring text may change how a border is tokenised, so this is an upper estimate,
        by a token or two, meant for planning windows.
        """
        encodings = self._plain.encode_batch(
            [f"[document 100] {_encodable(document)}\n\n" for document in documents],
            add_special_tokens=False,
        )
        return [len(encoding) + 1 for encoding in encodings]

    def frame_length(self, query: str) -> int:
        """Tokens of a prompt for ``query`` without any document, as an upper estimate."""
        return len(self.encode(query, [""]))

    def truncate(self, document: str, max_tokens: int) -> tuple[str, int]:
        """Cut ``document`` after ``max_tokens`` tokens; also return how many tokens were cut."""
        # In a prompt a space stands before the document, and may belong to its first token.
        text = f" {_encodable(document)}"
        encoding = self._plain.encode(text, add_special_tokens=False)
        if len(encoding) <= max_tokens:
            return document, 0
        kept, end = max_tokens, encoding.offsets[max_tokens][0]
        # A character of several tokens is kept whole or dropped whole.
        while kept and encoding.offsets[kept - 1][1] > end:
            kept -= 1
            end = encoding.offsets[kept][0]
        return text[1:end], len(encoding) - kept

    def passages(self, document: str, max_tokens: int) -> list[Span]:
        """Cover ``document`` with passages of at most ``max_tokens`` tokens of one length.

        Neighbours share about a quarter of their tokens, so that what stands at the end of one
        stands whole in the other. A character of several tokens is never divided: a passage may
        hold `BORDER_TOKENS` more.

        Returns:
            Ranges of characters, in order; one that holds all if the document is no longer.
        """
        encoding = self._plain.encode(f" {_encodable(document)}", add_special_tokens=False)
        count = len(encoding)
        if count <= max_tokens:
            return [Span(0, len(document))]
        steps = ceil((count - max_tokens) / (max_tokens - max_tokens // 4))
        starts = [step * (count - max_tokens) // steps for step in range(steps + 1)]
        # What the tokenizer has no token for goes with the token before it. The space in front
        # is not the document's, and the prompt puts one before a passage anyway.
        begins = [
            max(start - 1, 0) + (1 if document[max(start - 1, 0)] == " " else 0)
            for start, _ in encoding.offsets
        ]
        stops = [
            max(offset[1], following[0]) - 1
            for offset, following in pairwise([*encoding.offsets, (len(document) + 1,)])
        ]
        return [
            Span(begins[start] if start else 0, stops[start + max_tokens - 1]) for start in starts
        ]

    def _tokenise(
        self, text: str, data: Sequence[tuple[int, int]]
    ) -> tuple[TokenIds, npt.NDArray[np.int64]]:
        """Token ids of ``text`` and the character each begins at; none of the characters in
        the ranges ``data`` becomes a special token."""
        encoding = self._tokenizer.encode(text)
        ids = np.array(encoding.ids, dtype=np.int64)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        forged = [
            position
            for position in np.flatnonzero(np.isin(ids, self._special_ids))
            if _overlaps(offsets[position], data)
        ]
        for position in reversed(forged):
            start, end = offsets[position]
            plain = self._plain_tokens(text[start:end])
            ids = np.concatenate((ids[:position], plain.ids, ids[position + 1 :]))
            offsets = np.concatenate(
                (
                    offsets[:position],
                    np.array(plain.offsets, dtype=np.int64) + start,
                    offsets[position + 1 :],
                )
            )
        # A begin-of-sequence token lies at (0, 0) and normalizers may step back by a character:
        # keep the order that binary search needs.
        return ids, np.maximum.accumulate(offsets[:, 0])

    def _plain_tokens(self, text: str) -> _PlainTokens:
        # The newline keeps SentencePiece from adding the space it puts before a text's start.
        encoding: Encoding = self._plain.encode(f"\n{text}", add_special_tokens=False)
        kept = [
            (token_id, (start - 1, end - 1))
            for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if start >= 1
        ]
        return _PlainTokens([item[0] for item in kept], [item[1] for item in kept])


class _PlainTokens(NamedTuple):
    ids: list[int]
    offsets: list[tuple[int, int]]


def _overlaps(token: npt.NDArray[np.int64], ranges: Sequence[tuple[int, int]]) -> bool:
    start, end = token
    return any(start < range_end and end > range_start for range_start, range_end in ranges)


def _unpadded_copy(tokenizer: Tokenizer) -> Tokenizer:
    copy = type(tokenizer).from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def _encodable(text: str) -> str:
    """Replace surrogates, which no tokenizer can encode, by U+FFFD; no character moves."""
    return _SURROGATES.sub("\ufffd", text)
