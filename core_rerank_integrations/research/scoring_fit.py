"""The scoring configuration of fitted heads: weights of a first stage, and the calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from core_rerank_integrations.errors import InvalidInputError, requires_extra
from core_rerank_integrations.heads.scoring_config import Calibration, FirstStage
from core_rerank_integrations.method.scoring import rank_prior, score_prior
from core_rerank_integrations.research.collection import Collection, has_contrast
from core_rerank_integrations.research.weights import (
    Array,
    DevSets,
    JudgedList,
    mean_ndcg,
)

with requires_extra("eval"):
    from scipy.optimize import minimize

TRIED_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0)


class FirstStageWeights(NamedTuple):
    """How much a first stage counts beside the heads; see `ScoringConfig`."""

    rank_weight: float
    rank_weights: dict[FirstStage, float]
    score_weight: float | None


def choose_first_stage(weights: Array, dev: DevSets) -> FirstStageWeights:
    """Choose how much order and scores of the first stages of ``dev`` count, by nDCG@10.

    One weight has to serve first stages that are better and worse than the heads. Against the
    best weight of each collection, the chosen weight has the smallest maximum loss. Collections
    whose lists have no order are left out.

    Args:
        weights: Weight of each head, shape [heads].
        dev: Lists to choose by.
    """
    by_kind: dict[FirstStage, list[list[float]]] = {}
    by_scores = []
    for collection, lists in dev:
        if (kind := lists[0].first_stage) is None:
            continue
        scored = [(item, item.features @ weights) for item in lists]
        by_kind.setdefault(kind, []).append(
            _ndcg_by_weight(
                collection, scored, lambda item, weight: rank_prior(len(item.documents), weight)
            )
        )
        by_scores.append(
            _ndcg_by_weight(
                collection,
                scored,
                lambda item, weight: score_prior(item.first_stage_scores, weight),
            )
        )
    if not by_kind:
        return FirstStageWeights(0.0, {}, None)
    return FirstStageWeights(
        _least_regret([values for means in by_kind.values() for values in means]),
        {kind: _least_regret(means) for kind, means in by_kind.items() if kind != "other"},
        _least_regret(by_scores),
    )


def _ndcg_by_weight(
    collection: Collection,
    scored: Sequence[tuple[JudgedList, Array]],
    prior: Callable[[JudgedList, float], Array],
) -> list[float]:
    """Return the mean nDCG@10 for each of `TRIED_WEIGHTS`."""
    return [
        mean_ndcg(collection, [(item, scores + prior(item, weight)) for item, scores in scored])
        for weight in TRIED_WEIGHTS
    ]


def _least_regret(means: Sequence[Sequence[float]]) -> float:
    """Choose one of `TRIED_WEIGHTS`; ``means`` has shape [collections, weights]."""
    values = np.round(np.array(means), 6)
    regret = (values.max(axis=1, keepdims=True) - values).max(axis=0)
    return TRIED_WEIGHTS[int(regret.argmin())]


def calibrate(collections: Iterable[Sequence[tuple[Array, Array]]]) -> Calibration:
    """Fit Platt's map (1999) from scores to probabilities, by logistic loss.

    Args:
        collections: For each collection, the scores and grades of its lists. Each collection
            counts alike, however many candidates it has.

    Raises:
        InvalidInputError: All candidates are relevant, or none is.
    """
    pairs = [
        tuple(np.concatenate(arrays) for arrays in zip(*lists, strict=True))
        for lists in collections
    ]
    scores = np.concatenate([scores for scores, _ in pairs])
    relevant = np.concatenate([grades for _, grades in pairs]) > 0
    weights = np.concatenate([np.full(len(scores), 1 / len(scores)) for scores, _ in pairs])
    if not has_contrast(relevant):
        raise InvalidInputError(
            "a probability needs both relevant and irrelevant candidates to be fitted on"
        )
    centre, deviation = scores.mean(), scores.std() or 1.0
    features = np.column_stack(((scores - centre) / deviation, np.ones(len(scores))))
    slope, intercept = fit_logistic(features, relevant, weights)
    slope /= deviation
    return Calibration(slope=float(slope), intercept=float(intercept - slope * centre))


def fit_logistic(features: Array, positive: npt.NDArray[np.bool_], weights: Array) -> Array:
    """Fit a logistic regression whose first coefficient is above 0.

    Args:
        features: Shape [samples, coefficients].
        positive: Labels, shape [samples].
        weights: Weight of each sample, shape [samples].

    Returns:
        Shape [coefficients].
    """
    signs = np.where(positive, -1, 1)

    def loss(line: Array) -> float:
        return float(weights @ np.logaddexp(0, signs * (features @ line)))

    start = np.eye(features.shape[1])[0]
    bounds = [(1e-6, None), *[(None, None)] * (len(start) - 1)]
    line: Array = minimize(loss, start, bounds=bounds).x
    return line
