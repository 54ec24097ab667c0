"""How a list of documents is dealt into windows, one prompt each."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

from core_rerank_integrations.errors import DocumentTruncatedWarning, InvalidInputError
from core_rerank_integrations.prompt import BASELINE_QUERY, Prompt, PromptEncoder


class Window(NamedTuple):
    """One prompt of a request."""

    indices: list[int]
    """Which of the request's documents it holds."""
    documents: list[str]
    """Their texts, as far as they fit."""
    prompt: Prompt

    @property
    def key(self) -> bytes:
        """What the attention of the ``N/A`` twin depends on: all before the query span."""
        return self.prompt.prefix.tobytes()


class WindowPlanner:
    """Turns a query and its documents into prompts that fit the model.

    Args:
        encoder: Writes the prompts.
        max_context: Most tokens of a prompt.
        max_document_tokens: Longer documents are cut to this; ``None`` cuts only what does not
            fit the context by itself.
    """

    def __init__(
        self, encoder: PromptEncoder, max_context: int, max_document_tokens: int | None = None
    ) -> None:
        self._encoder = encoder
        self._max_context = max_context
        self._max_document_tokens = max_document_tokens

    def windows(
        self,
        query: str,
        documents: Sequence[str],
        size: int | None = None,
        reverse: bool = False,
    ) -> list[Window]:
        """The prompts of one request, of at most ``size`` documents each.

        Documents that do not fit are cut, with a `DocumentTruncatedWarning`. With ``reverse``
        each prompt shows its documents last first, so that a first stage's best stand nearest
        to the query.

        Raises:
            InvalidInputError: The query leaves no room for a document.
        """
        if not documents:
            return []
        frame = max(self._encoder.frame_length(query), self._encoder.frame_length(BASELINE_QUERY))
        documents = list(documents)
        lengths = self._encoder.document_lengths(documents)
        marker = self._encoder.document_lengths([""])[0]
        budget = self._max_context - frame
        if budget <= marker:
            raise InvalidInputError(
                f"the query leaves no room for a document: with its instruction it takes {frame} "
                f"tokens, and the model's context holds {self._max_context}"
            )
        longest = min(budget - marker, self._max_document_tokens or budget)
        for index, length in enumerate(lengths):
            if length - marker > longest:
                documents[index], dropped = self._encoder.truncate(documents[index], longest)
                lengths[index] = min(longest + marker, length)
                if dropped:
                    warnings.warn(
                        f"document {index} was cut to {longest} tokens; its last {dropped} tokens "
                        "were not ranked. Split long documents, or raise max_document_tokens",
                        DocumentTruncatedWarning,
                        stacklevel=5,
                    )
        windows = []
        for indices in plan_windows(lengths, budget, size):
            if reverse:
                indices.reverse()
            shown = [documents[index] for index in indices]
            windows.append(Window(indices, shown, self._encoder.encode(query, shown)))
        return windows

    def baseline(self, window: Window) -> Prompt:
        """The same prompt with ``N/A`` for the query, for calibration."""
        return self._encoder.encode(BASELINE_QUERY, window.documents)


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
    if not lengths:
        return []
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
