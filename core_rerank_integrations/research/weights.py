"""Learned weights: which heads to read, and how much each counts, from judged candidates.

The features are each head's calibrated attention mass on a document. The weights are those of a
linear listwise ranker with an L1 penalty, which leaves most heads out (the step that the authors
of arXiv 2510.02219 propose next).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from core_rerank_integrations._internal.progress import Progress, no_progress
from core_rerank_integrations.errors import InvalidInputError, requires_extra
from core_rerank_integrations.heads.head_set import Head
from core_rerank_integrations.heads.scoring_config import FirstStage
from core_rerank_integrations.method.scoring import best_indices
from core_rerank_integrations.method.windows import Layout
from core_rerank_integrations.research.collection import Collection, has_contrast
from core_rerank_integrations.research.features import HeadReader
from core_rerank_integrations.research.measures import MAIN_MEASURE, mean_measures
from core_rerank_integrations.research.sources import Sample

with requires_extra("eval"):
    from scipy.optimize import minimize

Array = npt.NDArray[np.float64]

MAX_ITERATIONS = 1000
MIN_DEVIATION = 0.1
"""Lower bound of a feature's deviation, as a share of the median feature's deviation."""
TINY = 1e-12


class JudgedList(NamedTuple):
    """A query's candidates in their order, with features and judgments.

    Attributes:
        query: Id of the query.
        documents: Ids of the candidates.
        features: Calibrated attention mass, shape [documents, heads].
        grades: Relevance grades, shape [documents].
        first_stage: Kind of the first stage; ``None`` if the order has no meaning.
        first_stage_scores: Scores of the first stage, shape [documents].
    """

    query: str
    documents: tuple[str, ...]
    features: Array
    grades: Array
    first_stage: FirstStage | None
    first_stage_scores: Array


DevSets = Sequence[tuple[Collection, Sequence[JudgedList]]]
"""Collections and lists to choose by; each collection counts alike, however many lists it has."""


def judged_lists(
    reader: HeadReader,
    sample: Sample,
    layout: Layout,
    candidates: int,
    progress: Progress = no_progress,
) -> list[JudgedList]:
    """Compute the features of the first ``candidates`` of each query.

    Args:
        reader: Computes the features.
        sample: The queries and their candidates.
        layout: How lists become prompts.
        candidates: Maximum number of candidates per query.
        progress: Wraps the prompts that have to be computed.
    """
    collection = sample.collection
    runs = [sample.run[query][:candidates] for query in sample.queries]
    lists = [
        collection.candidates(query, (name for name, _ in run))
        for query, run in zip(sample.queries, runs, strict=True)
    ]
    return [
        JudgedList(
            query,
            tuple(name for name, _ in run),
            features.sums.astype(np.float64),
            np.array([max(collection.qrels[query].get(name, 0), 0.0) for name, _ in run]),
            sample.source.first_stage,
            np.array([score for _, score in run]),
        )
        for query, run, features in zip(
            sample.queries, runs, reader.read_lists(lists, layout, progress), strict=True
        )
    ]


class ListwiseLoss:
    """Cross-entropy between targets and the softmax of linear scores, mean over lists.

    Args:
        features: Features of the documents of each list, shape [documents, features].
        relevance: Relevance of these documents, shape [documents]. It is normalised to a sum
            of 1 per list.
    """

    def __init__(self, features: Sequence[Array], relevance: Sequence[npt.NDArray[Any]]) -> None:
        self._features = np.concatenate(features)
        self._targets = np.concatenate([values / values.sum() for values in relevance])
        self._lengths = np.array([len(values) for values in relevance])
        self._starts = np.cumsum(self._lengths) - self._lengths

    def value_and_gradient(self, weights: Array) -> tuple[float, Array]:
        """Compute the loss, and its gradient of shape [features]."""
        logits = self._features @ weights
        logits -= self._per_row(np.maximum.reduceat(logits, self._starts))
        sums = np.add.reduceat(np.exp(logits), self._starts)
        log_shares = logits - self._per_row(np.log(sums))
        residual = np.exp(log_shares) - self._targets
        count = len(self._lengths)
        return -float(self._targets @ log_shares) / count, residual @ self._features / count

    def _per_row(self, values: Array) -> Array:
        return np.repeat(values, self._lengths)


def fit_weights(lists: Sequence[JudgedList], l1: float) -> Array:
    """Fit weights by listwise cross-entropy over each list's candidates, with an L1 penalty.

    The loss of a list is the cross-entropy between its grades, normalised to 1, and the softmax
    of its scores. Lists without a relevant or without an irrelevant candidate are left out,
    because nothing can be learned from them. Features are scaled to unit deviation (see
    `heads_scale`), so that the penalty treats all heads alike. The first stage's order is not
    part of the fit, because the heads should rank lists in any order.

    Args:
        lists: Judged candidates with features.
        l1: Strength of the penalty on the sum of absolute weights, at least 0.

    Returns:
        Shape [heads]; most are 0.

    Raises:
        InvalidInputError: No list has both a relevant and an irrelevant candidate.
    """
    lists = [item for item in lists if has_contrast(item.grades)]
    if not lists:
        raise InvalidInputError(
            "no list has both a relevant and an irrelevant candidate: there is nothing to fit on"
        )
    scale = heads_scale(lists)
    loss = ListwiseLoss([item.features / scale for item in lists], [item.grades for item in lists])

    def objective(parts: Array) -> tuple[float, Array]:
        # A weight is the difference of two non-negative parts, so the penalty has a gradient.
        positive, negative = np.split(parts, 2)
        value, gradient = loss.value_and_gradient(positive - negative)
        return value + l1 * float(parts.sum()), np.concatenate((gradient + l1, l1 - gradient))

    solution = minimize(
        objective,
        np.zeros(2 * len(scale)),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0.0, None)] * (2 * len(scale)),
        options={"maxiter": MAX_ITERATIONS},
    )
    positive, negative = np.split(solution.x, 2)
    weights: Array = (positive - negative) / scale
    return weights


def heads_scale(lists: Sequence[JudgedList]) -> Array:
    """Return the deviation of each feature over all documents, with a lower bound, shape [heads].

    The bound is `MIN_DEVIATION` of the median: a head with little attention on documents would
    get a weight of thousands, which would magnify the differences between precisions.
    """
    deviation = np.concatenate([item.features for item in lists]).std(axis=0)
    scale: Array = np.maximum(deviation, MIN_DEVIATION * float(np.median(deviation))) + TINY
    return scale


class Trial(NamedTuple):
    """A fit with one strength of the penalty.

    Attributes:
        l1: Strength of the penalty.
        weights: Weight of each head, shape [heads]; most are 0.
        ndcg: Mean nDCG@10 on the lists to choose by.
    """

    l1: float
    weights: Array
    ndcg: float

    @property
    def num_heads(self) -> int:
        """Number of heads with a weight."""
        return int(np.count_nonzero(self.weights))


def choose_weights(
    train: Sequence[JudgedList],
    dev: DevSets,
    strengths: Sequence[float],
    max_heads: int | None = None,
    progress: Progress = no_progress,
) -> tuple[Trial, list[Trial]]:
    """Fit with each strength of the penalty, and choose by mean nDCG@10 on ``dev``.

    Args:
        train: Lists to fit on.
        dev: Lists to choose by.
        strengths: Strengths of the penalty.
        max_heads: Fits with more heads are not chosen.
        progress: Wraps the strengths.

    Returns:
        The best trial (of equals, the one with fewer heads), and all trials.

    Raises:
        InvalidInputError: Every trial has more than ``max_heads`` heads, or none at all.
    """
    trials = []
    for l1 in progress(sorted(strengths, reverse=True), len(strengths)):
        weights = fit_weights(train, l1)
        means = [
            mean_ndcg(collection, [(item, item.features @ weights) for item in lists])
            for collection, lists in dev
        ]
        trials.append(Trial(l1, weights, float(np.mean(means))))
    allowed = [
        trial for trial in trials if trial.num_heads and trial.num_heads <= (max_heads or np.inf)
    ]
    if not allowed:
        raise InvalidInputError(
            f"none of the strengths {sorted(strengths)} leaves between 1 and {max_heads} heads; "
            f"they leave {sorted(trial.num_heads for trial in trials)}"
        )
    return max(allowed, key=lambda trial: (round(trial.ndcg, 6), -trial.num_heads)), trials


def selected_heads(weights: Array, heads: Sequence[Head]) -> tuple[Head, ...]:
    """Return the heads with a weight, strongest first; weights have six digits.

    Args:
        weights: Weight of each head, shape [heads].
        heads: The heads, in order.
    """
    return tuple(
        Head(
            layer=heads[index].layer,
            head=heads[index].head,
            weight=float(f"{weights[index]:.6g}"),
        )
        for index in sorted(np.flatnonzero(weights), key=lambda index: -abs(weights[index]))
    )


def mean_ndcg(collection: Collection, scored: Sequence[tuple[JudgedList, Array]]) -> float:
    """Compute the mean nDCG@10 of lists, given with the scores of their documents."""
    qrels = {item.query: collection.qrels[item.query] for item, _ in scored}
    run = {
        item.query: [item.documents[index] for index in best_indices(scores, len(scores))]
        for item, scores in scored
    }
    return mean_measures(qrels, run)[MAIN_MEASURE]
