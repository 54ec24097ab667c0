"""What a rerank returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RerankResult:
    """One candidate after reranking.

    Attributes:
        index: Position of the candidate in the list that was passed in.
        score: Calibrated attention mass; higher is more relevant. Comparable within one
            list, not between queries: it has no fixed range and may be negative.
        document: The candidate's text, as passed in.
    """

    index: int
    score: float
    document: str


def ranked(
    scores: Sequence[float],
    documents: Sequence[str],
    top_n: int | None = None,
    score_threshold: float | None = None,
) -> list[RerankResult]:
    """Sort by score, best first; ties keep the caller's order."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    results = [RerankResult(index, float(scores[index]), documents[index]) for index in order]
    if score_threshold is not None:
        results = [result for result in results if result.score >= score_threshold]
    return results[:top_n]
