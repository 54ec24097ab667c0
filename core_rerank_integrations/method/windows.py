"""Windows: a list of documents as prompts that fit the model."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from math import ceil
from typing import NamedTuple

from cachetools import LRUCache

from core_rerank_integrations._internal.warnings import warn_caller
from core_rerank_integrations.errors import (
    DocumentTruncatedWarning,
    InvalidInputError,
    LongDocumentWarning,
)
from core_rerank_integrations.method.passages import BORDER_TOKENS, passages, truncate
from core_rerank_integrations.method.prompt import (
    BASELINE_QUERY,
    PromptEncoder,
    Question,
    SharedPrefix,
    Span,
    TokenIds,
    text_key,
)
from core_rerank_integrations.method.scoring import Scores

CACHED_PASSAGES = 100_000
LONG_DOCUMENT_PASSAGES = 64
"""Documents of more passages are read with a warning: each costs as much as a document."""


class Candidates(NamedTuple):
    """A query and the documents to rank for it.

    Attributes:
        query: The query.
        documents: Texts of the documents.
        first_stage_scores: The first stage's score of each document, shape [documents], or
            ``None``.
    """

    query: str
    documents: tuple[str, ...]
    first_stage_scores: Scores | None = None


class Layout(NamedTuple):
    """How a list of documents becomes prompts.

    Attributes:
        documents_per_prompt: Maximum number of documents in a prompt; ``None`` for as many as
            the context holds.
        best_last: Whether a prompt shows its documents in reverse order.
        passage_tokens: In prompts of one document, longer documents are read as passages of this
            length; ``None`` for passages as long as the context allows.
        max_document_tokens: Longer documents are truncated to this length; ``None`` truncates
            only documents that cannot be read otherwise.
        max_query_tokens: Longer queries are refused; ``None`` for as long as the context allows.
    """

    documents_per_prompt: int | None = None
    best_last: bool = False
    passage_tokens: int | None = None
    max_document_tokens: int | None = None
    max_query_tokens: int | None = None


class Window(NamedTuple):
    """The documents of one prompt.

    Attributes:
        indices: Index of each document in the list.
        passages: Characters of each document that the prompt shows.
        texts: The text of these characters.
        prefix: The documents as token ids.
        question: Token ids of the query, shape [tokens].
    """

    indices: list[int]
    passages: list[Span]
    texts: list[str]
    prefix: SharedPrefix
    question: TokenIds


class WindowPlanner:
    """Turn a query and its documents into prompts that fit the model. Thread-safe.

    Args:
        encoder: Encoder of the prompts.
        max_context: Maximum number of tokens of a prompt.
    """

    def __init__(self, encoder: PromptEncoder, max_context: int) -> None:
        self._encoder = encoder
        self._max_context = max_context
        self._lock = threading.Lock()
        self._passages: LRUCache[tuple[bytes, int], list[Span]] = LRUCache(
            CACHED_PASSAGES, getsizeof=len
        )

    def windows(self, candidates: Candidates, layout: Layout) -> list[Window]:
        """Divide one list into prompts.

        A document that does not fit is truncated, with a `DocumentTruncatedWarning`. In prompts
        of one document it is divided into passages instead, unless ``max_document_tokens`` is
        set, which truncates it; a `LongDocumentWarning` names documents of very many passages.

        Raises:
            InvalidInputError: The query is longer than ``max_query_tokens``, or leaves no room
                for a document.
        """
        documents = candidates.documents
        if not documents:
            return []
        question = self._encoder.question(candidates.query)
        query_tokens = len(question.ids) - 1
        if layout.max_query_tokens is not None and query_tokens > layout.max_query_tokens:
            raise InvalidInputError(
                f"the query takes {query_tokens} tokens, and every one of them is read for every "
                f"document: shorten it to {layout.max_query_tokens}, or raise max_query_tokens"
            )
        frame = max(question.frame_length, self._encoder.baseline.frame_length)
        budget = self._max_context - frame
        overhead = self._encoder.document_overhead
        if budget <= overhead:
            raise InvalidInputError(
                f"the query leaves no room for a document: with its instruction it takes {frame} "
                f"tokens, and the model's context holds {self._max_context}"
            )
        if layout.documents_per_prompt == 1:
            pieces = self._pointwise_pieces(documents, budget - overhead, layout)
            groups = [[index] for index in range(len(pieces))]
        else:
            pieces, lengths = self._truncated_pieces(documents, budget - overhead, layout)
            in_prompt = [min(length + overhead, budget) for length in lengths]
            groups = plan_windows(in_prompt, budget, layout.documents_per_prompt)
        if layout.best_last:
            groups = [group[::-1] for group in groups]
        return self._encoded(documents, [[pieces[i] for i in group] for group in groups], question)

    def _encoded(
        self,
        documents: Sequence[str],
        groups: Sequence[list[tuple[int, Span]]],
        question: Question,
    ) -> list[Window]:
        texts = [[documents[index][slice(*span)] for index, span in group] for group in groups]
        return [
            Window(
                [index for index, _ in group],
                [span for _, span in group],
                group_texts,
                question.prefix_of(prefix),
                question.ids,
            )
            for group, group_texts, prefix in zip(
                groups, texts, self._encoder.prefixes(texts), strict=True
            )
        ]

    def _pointwise_pieces(
        self, documents: Sequence[str], room: int, layout: Layout
    ) -> list[tuple[int, Span]]:
        """Return the passages of each document as (document index, characters)."""
        if layout.max_document_tokens is None:
            whole = [(index, Span(0, len(text))) for index, text in enumerate(documents)]
            longest = room
        else:
            whole, _ = self._truncated_pieces(documents, room, layout)
            longest = min(room, layout.max_document_tokens)
            if layout.passage_tokens is None:
                return whole
        max_tokens = min(layout.passage_tokens or longest, max(longest - BORDER_TOKENS, 1))
        texts = [documents[index][slice(*span)] for index, span in whole]
        divided = self._passages_of(texts, max_tokens)
        for index, spans in enumerate(divided):
            if len(spans) > LONG_DOCUMENT_PASSAGES:
                warn_caller(
                    f"document {index} is read as {len(spans)} passages of {max_tokens} tokens, "
                    f"which takes as long as {len(spans)} documents. Split it and rank its best "
                    "parts, or set max_document_tokens",
                    LongDocumentWarning,
                )
        return [
            (index, span)
            for (index, _), spans in zip(whole, divided, strict=True)
            for span in spans
        ]

    def _passages_of(self, texts: Sequence[str], max_tokens: int) -> list[list[Span]]:
        keys = {text: (text_key((text,)), max_tokens) for text in texts}
        with self._lock:
            found = {
                text: self._passages[key] for text, key in keys.items() if key in self._passages
            }
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        # The prompts of whole documents come first: most documents need no other tokenisation.
        prefixes = self._encoder.prefixes([[text] for text in missing])
        long = [
            text
            for text, prefix in zip(missing, prefixes, strict=True)
            if _document_length(prefix) > max_tokens
        ]
        found |= {text: [Span(0, len(text))] for text in missing}
        for text, offsets in zip(long, self._encoder.offsets(long), strict=True):
            found[text] = passages(text, offsets, max_tokens)
        with self._lock:
            for text in missing:
                if len(found[text]) <= self._passages.maxsize:
                    self._passages[keys[text]] = found[text]
        return [found[text] for text in texts]

    def _truncated_pieces(
        self, documents: Sequence[str], room: int, layout: Layout
    ) -> tuple[list[tuple[int, Span]], list[int]]:
        """Truncate documents that do not fit; return (index, characters) and their lengths."""
        longest = min(room, layout.max_document_tokens or room)
        pieces: list[tuple[int, Span]] = []
        lengths = []
        for index, offsets in enumerate(self._encoder.offsets(documents)):
            span, dropped = truncate(documents[index], offsets, longest)
            if dropped:
                warn_caller(
                    f"document {index} was cut to {longest} tokens; its last {dropped} tokens "
                    "were not ranked. Split long documents, or raise max_document_tokens",
                    DocumentTruncatedWarning,
                )
            pieces.append((index, span))
            lengths.append(len(offsets) - dropped)
        return pieces, lengths


def truncated_documents(windows: Iterable[Window], documents: Sequence[str]) -> list[int]:
    """Return the indices of the documents whose end is in no prompt of their list."""
    stops = [0] * len(documents)
    for window in windows:
        for index, span in zip(window.indices, window.passages, strict=True):
            stops[index] = max(stops[index], span.stop)
    return [index for index, stop in enumerate(stops) if stop < len(documents[index])]


def baseline_candidates(documents: Sequence[str]) -> Candidates:
    """Return documents as candidates of the baseline query, ``N/A``."""
    return Candidates(BASELINE_QUERY, tuple(documents))


def plan_windows(lengths: Sequence[int], budget: int, size: int | None = None) -> list[list[int]]:
    """Divide documents among as few windows as hold them all.

    The documents of a prompt share its attention, so windows should be alike. Documents are
    dealt in turn (every k-th to the same window), which spreads the first stage's best over all
    windows, and window sizes differ by at most one document where token lengths allow. Documents
    longer than half a window are dealt first, because they would find no room later.

    Args:
        lengths: Number of tokens that each document adds to a prompt.
        budget: Number of tokens that a window has for documents; no length may exceed it.
        size: Maximum number of documents in a window; ``None`` sets no limit.

    Returns:
        Document indices per window, ascending within each.
    """
    if size == 1 or not lengths:
        return [[index] for index in range(len(lengths))]
    longest_first = sorted(range(len(lengths)), key=lambda index: 2 * lengths[index] <= budget)
    size = size or len(lengths)
    count = max(ceil(len(lengths) / size), ceil(sum(lengths) / budget))
    while (windows := _deal(longest_first, lengths, budget, size, count)) is None:
        count += 1
    return windows


def _deal(
    order: Sequence[int], lengths: Sequence[int], budget: int, size: int, count: int
) -> list[list[int]] | None:
    windows: list[list[int]] = [[] for _ in range(count)]
    used = [0] * count
    for index in order:
        open_windows = [
            window
            for window in range(count)
            if len(windows[window]) < size and used[window] + lengths[index] <= budget
        ]
        if not open_windows:
            return None
        window = min(open_windows, key=lambda window: len(windows[window]))
        windows[window].append(index)
        used[window] += lengths[index]
    return [sorted(window) for window in windows if window]


def _document_length(prefix: SharedPrefix) -> int:
    """Return the number of tokens that begin inside the prefix's only document."""
    span = prefix.document_spans[0]
    return span.stop - span.start - 1
