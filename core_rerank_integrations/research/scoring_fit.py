"""What is chosen once heads have their weights: a first stage's part, and what scores mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import numpy as np

from core_rerank_integrations.errors import InvalidInputError, requires_extra
from core_rerank_integrations.heads.scoring_config import Calibration, FirstStage, Ranked
from core_rerank_integrations.method.scoring import rank_prior, score_prior
from core_rerank_integrations.research.weights import Array, Judges, Weights, mean_ndcg

with requires_extra("eval"):
    from scipy.optimize import minimize

FIRST_STAGE_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0)
"""What is tried."""


class FirstStageWeights(NamedTuple):
    """How much a first stage counts beside the heads; see `ScoringConfig`."""

    rank_weight: float
    rank_weights: dict[FirstStage, float]
    score_weight: float | None


def choose_first_stage(weights: Weights, dev: Judges) -> FirstStageWeights:
    """How much order and scores of the first stages of ``dev`` should count, by nDCG@10.

    One weight has to serve first stages that are better and worse than the heads: the one is
    taken that loses least where it loses most, against the best weight of each collection.
    Collections whose lists are in no order have no part in it.

    Args:
        weights: Of the heads.
        dev: Lists to choose by.
    """
    by_order: dict[Ranked, list[list[float]]] = {}
    by_scores = []
    for collection, lists in dev:
        if not (ranked := lists[0].ranked):
            continue
        scored = [(item, weights.scores(item)) for item in lists]
        by_order.setdefault(ranked, []).append(
            [
                mean_ndcg(collection, [(i, s + rank_prior(len(s), weight)) for i, s in scored])
                for weight in FIRST_STAGE_WEIGHTS
            ]
        )
        by_scores.append(
            [
                mean_ndcg(
                    collection, [(i, s + score_prior(i.first_stage, weight)) for i, s in scored]
                )
                for weight in FIRST_STAGE_WEIGHTS
            ]
        )
    if not by_order:
        return FirstStageWeights(0.0, {}, None)
    kinds = {kind: _least_regret(means) for kind, means in by_order.items() if kind is not True}
    return FirstStageWeights(
        _least_regret([values for means in by_order.values() for values in means]),
        cast(dict[FirstStage, float], kinds),
        _least_regret(by_scores),
    )


def _least_regret(means: Sequence[Sequence[float]]) -> float:
    """Of `FIRST_STAGE_WEIGHTS`; ``means`` holds what each brings, per collection."""
    values = np.round(np.array(means), 6)
    regret = (values.max(axis=1, keepdims=True) - values).max(axis=0)
    return FIRST_STAGE_WEIGHTS[int(regret.argmin())]


def calibrate(groups: Iterable[Sequence[tuple[Array, Array]]]) -> Calibration:
    """Fit what a score means as a probability (Platt, 1999), by logistic loss.

    Args:
        groups: Of each collection, the scores and grades of its lists; each collection counts the
            same, however many candidates it has.

    Raises:
        InvalidInputError: All candidates are relevant, or none is.
    """
    scored = [
        (
            np.concatenate([scores for scores, _ in lists]),
            np.concatenate([grades > 0 for _, grades in lists]),
        )
        for lists in groups
    ]
    scores = np.concatenate([scores for scores, _ in scored])
    relevant = np.concatenate([relevant for _, relevant in scored])
    weights = np.concatenate([np.full(len(scores), 1 / len(scores)) for scores, _ in scored])
    if relevant.all() or not relevant.any():
        raise InvalidInputError(
            "a probability needs both relevant and irrelevant candidates to be fitted on"
        )
    centre, deviation = scores.mean(), scores.std() or 1.0

    def loss(line: Array) -> float:
        margins = line[0] * (scores - centre) / deviation + line[1]
        return float(weights @ np.logaddexp(0, np.where(relevant, -margins, margins)))

    slope, intercept = minimize(loss, [1.0, 0.0], bounds=[(1e-6, None), (None, None)]).x
    slope /= deviation
    return Calibration(slope=float(slope), intercept=float(intercept - slope * centre))
