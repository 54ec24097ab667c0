"""How good rankings and probabilities are."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from core_rerank_integrations.errors import requires_extra
from core_rerank_integrations.research.collection import Qrels

MEASURES = ("nDCG@1", "nDCG@5", "nDCG@10", "AP", "RR", "R@5", "R@10")
"""In the notation of ir-measures; their means over queries are known as MAP, MRR and recall."""
MAIN_MEASURE = "nDCG@10"
RELIABILITY_BINS = 10

Measured = dict[str, dict[str, float]]
"""Per query id, the value of each of `MEASURES`."""


def measure(qrels: Qrels, run: Mapping[str, Sequence[str]]) -> Measured:
    """All `MEASURES` for every judged query; a query that the run lacks counts as 0.

    Args:
        qrels: Relevance grades.
        run: Document ids per query id, best first.
    """
    with requires_extra("eval"):
        import ir_measures
    scored = {
        query: {document: -float(rank) for rank, document in enumerate(ranking)}
        for query, ranking in run.items()
    }
    parsed = {ir_measures.parse_measure(name): name for name in MEASURES}
    measured: Measured = {query: dict.fromkeys(MEASURES, 0.0) for query in qrels}
    for value in ir_measures.iter_calc(list(parsed), qrels, scored):
        measured[value.query_id][parsed[value.measure]] = float(value.value)
    return measured


def mean_measures(qrels: Qrels, run: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Means of all `MEASURES` over the judged queries."""
    return means_of(measure(qrels, run))


class ReliabilityBin(NamedTuple):
    """Candidates of about the same predicted probability.

    Attributes:
        predicted: Mean predicted probability.
        observed: Share of them that is relevant.
        candidates: How many they are.
    """

    predicted: float
    observed: float
    candidates: int


def reliability(
    probabilities: npt.ArrayLike, relevant: npt.ArrayLike, bins: int = RELIABILITY_BINS
) -> list[ReliabilityBin]:
    """Predictions against judgments, in ``bins`` of equal width; empty ones are left out."""
    predicted, judged = np.asarray(probabilities, float), np.asarray(relevant, bool)
    places = np.minimum((predicted * bins).astype(int), bins - 1)
    return [
        ReliabilityBin(
            float(predicted[places == place].mean()),
            float(judged[places == place].mean()),
            int((places == place).sum()),
        )
        for place in np.unique(places)
    ]


def expected_calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Mean distance of predicted and observed, each bin counting by its candidates.

    Naeini et al., 2015, "Obtaining well calibrated probabilities using Bayesian binning".
    """
    total = sum(part.candidates for part in bins)
    return sum(part.candidates * abs(part.predicted - part.observed) for part in bins) / total


def means_of(measured: Measured) -> dict[str, float]:
    """Means of all `MEASURES` over queries."""
    return {
        name: statistics.fmean(values[name] for values in measured.values()) for name in MEASURES
    }
