"""Measures of rankings and of probabilities."""

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
"""Value of each of `MEASURES` per query id."""


def measure(qrels: Qrels, run: Mapping[str, Sequence[str]]) -> Measured:
    """Compute all `MEASURES` of every judged query; a query that the run lacks counts as 0.

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


def means_of(measured: Measured) -> dict[str, float]:
    """Compute the means of all `MEASURES` over queries."""
    return {
        name: statistics.fmean(values[name] for values in measured.values()) for name in MEASURES
    }


def mean_measures(qrels: Qrels, run: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Compute the means of all `MEASURES` over the judged queries; see `measure`."""
    return means_of(measure(qrels, run))


class ReliabilityBin(NamedTuple):
    """Candidates of similar predicted probability.

    Attributes:
        predicted: Mean predicted probability.
        observed: Share of relevant candidates.
        candidates: Number of candidates.
    """

    predicted: float
    observed: float
    candidates: int


def reliability(probabilities: npt.ArrayLike, relevant: npt.ArrayLike) -> list[ReliabilityBin]:
    """Compare predictions with judgments in ten bins of equal width, without empty bins.

    Args:
        probabilities: Predicted probabilities, shape [candidates].
        relevant: Judgments, shape [candidates].
    """
    predicted, judged = np.asarray(probabilities, float), np.asarray(relevant, bool)
    indices = np.minimum((predicted * RELIABILITY_BINS).astype(int), RELIABILITY_BINS - 1)
    return [
        ReliabilityBin(
            float(predicted[indices == index].mean()),
            float(judged[indices == index].mean()),
            int((indices == index).sum()),
        )
        for index in np.unique(indices)
    ]


def expected_calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Compute the mean distance of predicted and observed, weighted by candidates.

    Naeini et al., 2015, "Obtaining well calibrated probabilities using Bayesian binning".
    """
    total = sum(part.candidates for part in bins)
    return sum(part.candidates * abs(part.predicted - part.observed) for part in bins) / total
