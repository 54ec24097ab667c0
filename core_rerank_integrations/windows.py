"""How a list of documents is dealt into windows, one prompt each."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil


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
