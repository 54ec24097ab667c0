"""The prompt of arXiv 2510.02219 as token ids: a shared prefix and a question."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from cachetools import LRUCache

from core_rerank_integrations.method.templates import PromptTemplate

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

INTRODUCTION = " Here are some paragraphs:\n\n"
INSTRUCTION = (
    "Please find information that are relevant to the following query in the paragraphs above."
    "\n\nQuery: "
)
BASELINE_QUERY = "N/A"
PREFIX_CACHE_BYTES = 1 << 26
"""Size limit of the cache of encoded prefixes."""

TokenIds = npt.NDArray[np.int64]

_SURROGATES = re.compile("[\ud800-\udfff]")


class Span(NamedTuple):
    """Tokens ``start`` to ``stop - 1`` of a prompt, or characters of a text."""

    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class SharedPrefix:
    """The part of a prompt that does not depend on the question.

    Attributes:
        ids: Token ids of the documents and of the instruction after them, shape [tokens].
        instruction_length: Number of tokens at the end of ``ids`` that belong to the query span.
        document_spans: Tokens of each document and the one token after it. The last span may
            end with the first token of the query span (see `PromptEncoder`).
        document_starts: For each document, the character of its text at which each token of its
            span begins, shape [tokens]. Tokens after the document have its length.
        baseline: Token ids of ``N/A`` as the question, shape [tokens].
    """

    ids: TokenIds
    instruction_length: int
    document_spans: tuple[Span, ...]
    document_starts: tuple[npt.NDArray[np.int64], ...]
    baseline: TokenIds

    @property
    def context_length(self) -> int:
        """Number of tokens before the query span."""
        return len(self.ids) - self.instruction_length

    @property
    def documents_stop(self) -> int:
        """Index after the last token of the last document's span."""
        return max(span.stop for span in self.document_spans)

    @cached_property
    def key(self) -> bytes:
        """Digest of the ids and of where the query span starts, 16 bytes."""
        digest = hashlib.blake2b(self.instruction_length.to_bytes(4), digest_size=16)
        digest.update(self.ids.tobytes())
        return digest.digest()

    def nbytes(self) -> int:
        """Return the size of the arrays in bytes."""
        return sum(array.nbytes for array in (self.ids, self.baseline, *self.document_starts))


@dataclass(frozen=True, eq=False)
class Question:
    """A query as the tokens that follow the shared prefix.

    Attributes:
        ids: Token ids of the query and of the token after it, shape [tokens].
        frame_length: Number of tokens of a whole prompt without documents.
        changed_instruction: Number of tokens at the end of the instruction that this query
            changes. They move from the prefix to the question; usually 0.
    """

    ids: TokenIds
    frame_length: int
    changed_instruction: int = 0

    def prefix_of(self, prefix: SharedPrefix) -> SharedPrefix:
        """Return ``prefix`` without the instruction tokens that this query changes."""
        if not self.changed_instruction:
            return prefix
        kept = len(prefix.ids) - self.changed_instruction
        return replace(
            prefix,
            ids=prefix.ids[:kept],
            instruction_length=prefix.instruction_length - self.changed_instruction,
            baseline=np.concatenate((prefix.ids[kept:], prefix.baseline)),
        )


class PromptEncoder:
    """Turn documents and queries into token ids and spans. Instances are thread-safe.

    Each list of documents is tokenised once, in one prompt with ``N/A`` as the query, and kept.
    Spans come from character offsets:

    - A document's span starts at its first token and ends with the first token that begins at
      or after its last character, as in the authors' code.
    - The query span starts at the first token that begins after the newline that closes the
      last document. This equals the authors' count of the tokens of a cut-off prompt where a
      tokenizer joins both newlines when nothing follows (byte-level BPE). Where newlines are
      separate tokens (SentencePiece) it is one token earlier, the second newline.
    - When punctuation and newlines share a token, the first token of the query span is also the
      token after the last document and counts for both, as in the authors' code.

    Args:
        tokenizer: The model's tokenizer. It is copied and never changed.
        template: The turn markers around the prompt. Only these become special tokens; the same
            characters in a document or a query stay plain characters.
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
        self._lock = threading.Lock()
        self._prefixes: LRUCache[bytes, SharedPrefix] = LRUCache(
            PREFIX_CACHE_BYTES, getsizeof=SharedPrefix.nbytes
        )

    @cached_property
    def baseline(self) -> Question:
        """The question of the baseline prompt, ``N/A``."""
        return self.question(BASELINE_QUERY)

    @cached_property
    def document_overhead(self) -> int:
        """Upper bound of the tokens that a prompt holds for each document beside its text."""
        marker = self._plain.encode("[document 100] \n\n", add_special_tokens=False)
        return len(marker) + 1

    def question(self, query: str) -> Question:
        """Tokenise a query in a prompt without documents.

        The instruction separates the query from the documents, so the tokens of the query do
        not depend on them.
        """
        (frame,) = self._encode([_PromptText(self.template, ("",), query)])
        (baseline,) = self._encode([_PromptText(self.template, ("",), BASELINE_QUERY)])
        shared = baseline.instruction_stop
        while shared > baseline.query_start and not np.array_equal(
            frame.ids[:shared], baseline.ids[:shared]
        ):
            shared -= 1
        return Question(
            frame.ids[shared : frame.stop],
            frame.stop,
            changed_instruction=baseline.instruction_stop - shared,
        )

    def prefixes(self, groups: Sequence[Sequence[str]]) -> list[SharedPrefix]:
        """Encode the shared prefix of each group of documents.

        Args:
            groups: The documents of each prompt, in order.

        Returns:
            One prefix per group.
        """
        keys = [text_key(group) for group in groups]
        by_key = dict(zip(keys, groups, strict=True))
        with self._lock:
            found = {key: self._prefixes[key] for key in by_key if key in self._prefixes}
        missing = [key for key in by_key if key not in found]
        texts = [_PromptText(self.template, by_key[key], BASELINE_QUERY) for key in missing]
        for key, encoded in zip(missing, self._encode(texts), strict=True):
            found[key] = prefix = encoded.prefix()
            with self._lock:
                if prefix.nbytes() <= self._prefixes.maxsize:
                    self._prefixes[key] = prefix
        return [found[key] for key in keys]

    def offsets(self, documents: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Tokenise documents by themselves.

        Returns:
            For each document, the start and stop of each token, in characters of the document
            with a space in front, as in a prompt.
        """
        encodings = self._plain.encode_batch(
            [f" {encodable(document)}" for document in documents], add_special_tokens=False
        )
        return [encoding.offsets for encoding in encodings]

    def _encode(self, texts: Sequence[_PromptText]) -> Iterator[_EncodedPrompt]:
        encodings = self._tokenizer.encode_batch([text.text for text in texts])
        for text, encoding in zip(texts, encodings, strict=True):
            yield _EncodedPrompt(text, *self._without_forged(text, encoding))

    def _without_forged(
        self, text: _PromptText, encoding: Encoding
    ) -> tuple[TokenIds, npt.NDArray[np.int64]]:
        """Return the token ids and the character at which each token begins.

        Special tokens that documents or the query spell out become tokens of plain characters.
        """
        ids = np.array(encoding.ids, dtype=np.int64)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        data = [*text.documents, text.query]
        forged = [
            index
            for index in np.flatnonzero(np.isin(ids, self._special_ids))
            if any(offsets[index, 0] < stop and offsets[index, 1] > start for start, stop in data)
        ]
        parts: list[tuple[TokenIds, npt.NDArray[np.int64]]] = []
        done = 0
        for index in forged:
            start, stop = offsets[index]
            plain_ids, plain_offsets = self._plain_tokens(text.text[start:stop])
            parts.append((ids[done:index], offsets[done:index]))
            parts.append((plain_ids, plain_offsets + start))
            done = index + 1
        parts.append((ids[done:], offsets[done:]))
        ids, offsets = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        # The begin-of-sequence token is at (0, 0), and normalizers may step back by a character:
        # binary search needs sorted starts.
        return ids, np.maximum.accumulate(offsets[:, 0])

    def _plain_tokens(self, text: str) -> tuple[TokenIds, npt.NDArray[np.int64]]:
        # The newline keeps SentencePiece from adding the space it puts before a text's start.
        encoding = self._plain.encode(f"\n{text}", add_special_tokens=False)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        inside = offsets[:, 0] >= 1
        return np.array(encoding.ids, dtype=np.int64)[inside], offsets[inside] - 1


class _PromptText:
    """The text of a prompt, and the characters of its documents and its query."""

    def __init__(self, template: PromptTemplate, documents: Sequence[str], query: str) -> None:
        parts = [template.turn_start, INTRODUCTION]
        length = sum(map(len, parts))
        self.documents: list[Span] = []
        for number, document in enumerate(documents, start=1):
            marker, text = f"[document {number}]", f" {encodable(document)}"
            start = length + len(marker)
            self.documents.append(Span(start, start + len(text)))
            parts += (marker, text, "\n\n")
            length = start + len(text) + 2
        query = encodable(query.strip())
        start = length + len(INSTRUCTION)
        self.query = Span(start, start + len(query))
        parts += (INSTRUCTION, query, template.turn_end)
        self.text = "".join(parts)


class _EncodedPrompt:
    """A tokenised prompt.

    Attributes:
        ids: All token ids.
        query_start: Index of the first token of the query span.
        instruction_stop: Index of the first token of the query itself.
        stop: Index after the query span.
    """

    def __init__(self, text: _PromptText, ids: TokenIds, starts: npt.NDArray[np.int64]) -> None:
        self._text = text
        self._starts = starts
        self.ids = ids
        self.query_start = self._first_token(text.documents[-1].stop + 1)
        # The space before the query belongs to its first token, or is a token of its own.
        self.instruction_stop = max(self._first_token(text.query.start - 1), self.query_start)
        self.stop = min(self._first_token(text.query.stop) + 1, len(ids))

    def prefix(self) -> SharedPrefix:
        """Return everything before the query itself; the query must be ``N/A``."""
        spans = tuple(
            Span(self._first_token(start), self._first_token(stop) + 1)
            for start, stop in self._text.documents
        )
        # The space in front of a document is not part of its text.
        starts = tuple(
            np.clip(self._starts[span.start : span.stop] - start - 1, 0, stop - start - 1)
            for span, (start, stop) in zip(spans, self._text.documents, strict=True)
        )
        return SharedPrefix(
            self.ids[: self.instruction_stop],
            self.instruction_stop - self.query_start,
            spans,
            starts,
            self.ids[self.instruction_stop : self.stop],
        )

    def _first_token(self, character: int) -> int:
        return int(np.searchsorted(self._starts, character))


def text_key(texts: Sequence[str]) -> bytes:
    """Return a digest of texts, 16 bytes; caches that are keyed by it do not keep the texts."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        encoded = text.encode(errors="surrogatepass")
        digest.update(len(encoded).to_bytes(8))
        digest.update(encoded)
    return digest.digest()


def encodable(text: str) -> str:
    """Replace surrogates, which UTF-8 cannot encode, by U+FFFD; offsets do not change."""
    return _SURROGATES.sub("\ufffd", text)


def _unpadded_copy(tokenizer: Tokenizer) -> Tokenizer:
    copy = type(tokenizer).from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy
