"""What the framework adapters hand out: the score and the metadata of each object."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, nextafter
from typing import Any

from core_rerank_integrations.method.extraction import evidence_within
from core_rerank_integrations.results import RerankResult, RerankResults

METADATA_KEY = "core_rerank"
"""Key of all that the adapters write into an object's metadata, besides LangChain's own key."""


def falling_scores(results: RerankResults) -> list[float]:
    """Return the scores of a list for frameworks, each below the one before.

    Frameworks sort by the score in either direction, so equal ones would change places. Documents
    that were not read get 0, or less if others have: LlamaIndex takes ``None`` for 0, which may be
    above the others, and JSON has no infinity.
    """
    scores: list[float] = []
    highest = inf
    for result in results:
        scores.append(min(result.score if result.reranked else 0.0, highest))
        highest = nextafter(scores[-1], -inf)
    return scores


def result_metadata(
    result: RerankResult, evidence: bool, start: int = 0, stop: int | None = None
) -> dict[str, Any]:
    """Return what is written below `METADATA_KEY`; JSON can express it.

    Args:
        result: The result of an object.
        evidence: Whether to include its sentences.
        start: First character of the object's own text, in characters of the text that was ranked.
        stop: Index after its last character; ``None`` for the end.
    """
    stop = len(result.document) if stop is None else stop
    metadata: dict[str, Any] = {"probability": result.probability, "reranked": result.reranked}
    if evidence:
        own = evidence_within(result.evidence, start, stop)
        metadata["evidence"] = [[part.start, part.stop, part.score] for part in own]
    if result.best_passage is not None:
        first, last = max(result.best_passage[0], start), min(result.best_passage[1], stop)
        if first < last:
            metadata["best_passage"] = [first - start, last - start]
    return metadata


def relevance(metadata: Mapping[str, Any], score: float | None) -> float | None:
    """Return the probability of a ranked object, or its score if the heads are not calibrated."""
    probability: float | None = metadata.get(METADATA_KEY, {}).get("probability")
    return score if probability is None else probability
