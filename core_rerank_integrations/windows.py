"""How a list of documents is dealt into windows, one prompt each."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

from core_rerank_integrations.errors import DocumentTruncatedWarning, InvalidInputError
from core_rerank_integrations.prompt import (
    BASELINE_QUERY,
    BORDER_TOKENS,
    Prompt,
    PromptEncoder,
    Span,
)


class Layout(NamedTuple):
    """How a list of documents becomes prompts."""

    size: int | None = None
    """Most documents of a prompt; ``None`` for as many as the context holds."""
    reverse: bool = False
    """Whether a prompt shows its documents last first."""
    passage_tokens: int | None = None
    """In prompts of one document, longer ones are read passage by passage; ``None`` for as long
    as the context allows."""
    max_document_tokens: int | None = None
    """Longer documents are cut to this; ``None`` cuts only what cannot be read otherwise."""


class Window(NamedTuple):
    """One prompt of a list."""

    indices: list[int]
    """Which of the list's documents it holds."""
    passages: list[Span]
    """The characters of each that it shows."""
    texts: list[str]
    """These characters."""
    prompt: Prompt

    @property
    def key(self) -> bytes:
        """What the attention of the ``N/A`` prompt depends on: all before the query span."""
        return self.prompt.prefix.tobytes()


class WindowPlanner:
    """Turns a query and its documents into prompts that fit the model.

    Args:
        encoder: Writes the prompts.
        max_context: Most tokens of a prompt.
    """

    def __init__(self, encoder: PromptEncoder, max_context: int) -> None:
        self._encoder = encoder
        self._max_context = max_context

    def windows(self, query: str, documents: Sequence[str], layout: Layout) -> list[Window]:
        """The prompts of one list.

        A document that does not fit is cut, with a `DocumentTruncatedWarning`; in prompts of one
        document it is read passage by passage instead, unless ``max_document_tokens`` says that
        it be cut.

        Raises:
            InvalidInputError: The query leaves no room for a document.
        """
        if not documents:
            return []
        frame = max(self._encoder.frame_length(query), self._encoder.frame_length(BASELINE_QUERY))
        marker = self._encoder.document_lengths([""])[0]
        budget = self._max_context - frame
        if budget <= marker:
            raise InvalidInputError(
                f"the query leaves no room for a document: with its instruction it takes {frame} "
                f"tokens, and the model's context holds {self._max_context}"
            )
        room = budget - marker
        pieces = self._pieces(documents, room, layout)
        texts = [documents[index][span.start : span.stop] for index, span in pieces]
        lengths = [min(length, budget) for length in self._encoder.document_lengths(texts)]
        windows = []
        for places in plan_windows(lengths, budget, layout.size):
            if layout.reverse:
                places.reverse()
            shown = [texts[place] for place in places]
            windows.append(
                Window(
                    [pieces[place][0] for place in places],
                    [pieces[place][1] for place in places],
                    shown,
                    self._encoder.encode(query, shown),
                )
            )
        return windows

    def baseline(self, window: Window) -> Prompt:
        """The same prompt with ``N/A`` for the query, for calibration."""
        return self._encoder.encode(BASELINE_QUERY, window.texts)

    def _pieces(
        self, documents: Sequence[str], room: int, layout: Layout
    ) -> list[tuple[int, Span]]:
        """What is read of the documents: index, and range of characters."""
        longest = min(room, layout.max_document_tokens or room)
        passage_tokens = min(layout.passage_tokens or longest, max(longest - BORDER_TOKENS, 1))
        pieces: list[tuple[int, Span]] = []
        for index, document in enumerate(documents):
            whole = Span(0, len(document))
            if layout.size != 1 or layout.max_document_tokens:
                kept, dropped = self._encoder.truncate(document, longest)
                if dropped:
                    whole = Span(0, len(kept))
                    warnings.warn(
                        f"document {index} was cut to {longest} tokens; its last {dropped} tokens "
                        "were not ranked. Split long documents, or raise max_document_tokens",
                        DocumentTruncatedWarning,
                        stacklevel=7,
                    )
            if layout.size == 1 and (layout.passage_tokens or not layout.max_document_tokens):
                text = document[: whole.stop]
                pieces += ((index, span) for span in self._encoder.passages(text, passage_tokens))
            else:
                pieces.append((index, whole))
        return pieces


def plan_windows(lengths: Sequence[int], budget: int, size: int | None = None) -> list[list[int]]:
    """Deal documents into as few windows as hold them all.

    Attention is shared out within a prompt, so windows should be alike: the documents are
    dealt in turn (every k-th to the same window), which also spreads the first stage's best
    over all of them, and window sizes differ by one document at most wherever token lengths
    allow. Documents longer than half a window are placed first, or they would find no room.

    Args:
        lengths: Tokens each document adds to a prompt.
        budget: Tokens a window has for documents; no length may exceed it.
        size: Most documents a window may hold; ``None`` sets no limit.

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
