"""Long documents: cut to a number of tokens, or divided into overlapping passages."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import ceil

from core_rerank_integrations.method.prompt import Span

BORDER_TOKENS = 8
"""Tokens by which a passage may exceed its length, because characters are never divided."""

Offsets = Sequence[tuple[int, int]]
"""Start and stop of each token of a document; see `PromptEncoder.offsets`."""


def truncate(document: str, offsets: Offsets, max_tokens: int) -> tuple[Span, int]:
    """Cut a document after ``max_tokens`` tokens.

    Returns:
        The characters that are kept, and the number of tokens that are dropped.
    """
    if len(offsets) <= max_tokens:
        return Span(0, len(document)), 0
    kept, stop = max_tokens, offsets[max_tokens][0]
    # A character of several tokens is kept whole or dropped whole.
    while kept and offsets[kept - 1][1] > stop:
        kept -= 1
        stop = offsets[kept][0]
    # The offsets count the space in front of the document.
    return Span(0, max(stop - 1, 0)), len(offsets) - kept


def passages(document: str, offsets: Offsets, max_tokens: int) -> list[Span]:
    """Cover a document with passages of at most ``max_tokens`` tokens, all of one length.

    Neighbours share about a quarter of their tokens, so that text at the end of one passage is
    inside the other. A passage may exceed ``max_tokens`` by `BORDER_TOKENS`, because a character
    of several tokens is never divided.

    Returns:
        Ranges of characters, in order; one range if the document is no longer than a passage.
    """
    count = len(offsets)
    if count <= max_tokens:
        return [Span(0, len(document))]
    steps = ceil((count - max_tokens) / (max_tokens - max_tokens // 4))
    first_tokens = [step * (count - max_tokens) // steps for step in range(steps + 1)]
    # Offsets count the space in front of the document, and a prompt puts a space before each
    # passage. Characters without a token go with the token before them.
    starts = [
        max(start - 1, 0) + (1 if document[max(start - 1, 0)] == " " else 0) for start, _ in offsets
    ]
    stops = [
        max(stop, next_start) - 1
        for (_, stop), (next_start, _) in pairwise([*offsets, (len(document) + 1,) * 2])
    ]
    return [
        Span(starts[first] if first else 0, stops[first + max_tokens - 1]) for first in first_tokens
    ]
