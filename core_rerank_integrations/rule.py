"""How a head set ranks: what it wants in a prompt, and how attention becomes scores."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from core_rerank_integrations.scoring import Scores

FirstStage = Literal["bm25", "vectors"]
"""What a first stage may be: a ranking by words in common, or by embeddings."""

Ranked = bool | FirstStage
"""Whether documents come in a first stage's order, its best first; or by which kind of one."""

Threshold = float | Literal["auto"] | None
"""Which results are left out: those of a lower relevance; ``"auto"``: all, where none answers."""

SMALLEST = 1e-12
"""Probability that log-odds are taken of."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Calibration(BaseModel):
    """From a document's score to the probability that it is relevant (Platt's logistic map).

    Attributes:
        slope: What a score is multiplied by; above 0, so that the order stays.
        intercept: What is added then.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    slope: Positive
    intercept: Finite

    def probabilities(self, scores: Scores) -> Scores:
        """``1 / (1 + exp(-(slope * score + intercept)))``, shape of ``scores``."""
        return logistic(self.slope * scores + self.intercept)


class Abstention(BaseModel):
    """When nothing in a list is relevant, by how far its best candidate stands above the others.

    Some questions raise what every candidate gets, so the best one's own probability says less.
    The mean of a short list says little about its question: it is drawn towards that of all
    lists, as if so many candidates of that mean stood in it too (James and Stein's estimator).
    The more candidates, the further the best of them stands out by chance.

    Attributes:
        mean: Log-odds of a candidate, over all lists.
        candidates: How many candidates of that mean are added to a list's own.
        slope: What the distance is multiplied by.
        size_slope: What the logarithm of the number of candidates is multiplied by.
        intercept: What is added then.
        threshold: Probability below which a list is said to hold nothing relevant.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: Finite
    candidates: NotNegative
    slope: Positive
    size_slope: Finite
    intercept: Finite
    threshold: float = Field(ge=0, le=1)

    def probability(self, probabilities: npt.ArrayLike) -> float:
        """That a list holds something relevant; 0 where it is empty.

        Args:
            probabilities: Of its candidates, in any order, shape [candidates].
        """
        given = log_odds(probabilities)
        if not len(given):
            return 0.0
        stands_out = distance(given, self.mean, self.candidates)
        by_size = self.size_slope * np.log(len(given))
        return float(logistic(self.slope * stands_out + by_size + self.intercept))


def distance(given: Scores, mean: float, candidates: float) -> float:
    """How far the best of one list's log-odds stands above their mean, drawn towards ``mean``."""
    total = given.sum() + candidates * mean
    return float(given.max() - total / (len(given) + candidates))


def logistic(given: npt.ArrayLike) -> Scores:
    """From log-odds to probabilities, of any shape."""
    # The hyperbolic tangent does not overflow.
    return 0.5 * (1 + np.tanh(np.asarray(given, dtype=np.float64) / 2))


def log_odds(probabilities: npt.ArrayLike) -> Scores:
    """From probabilities to log-odds, of any shape; 0 and 1 stay finite."""
    given = np.clip(np.asarray(probabilities, dtype=np.float64), SMALLEST, 1 - SMALLEST)
    return np.log(given / (1 - given))


class RankingRule(BaseModel):
    """What was chosen together with the heads, and belongs to them.

    Attributes:
        window: Documents per prompt that the heads rank best; ``None`` for as many as fit.
        reverse: Whether a prompt shows its documents last first, so that a first stage's best
            stand nearest to the query.
        passage_tokens: Longest document, in tokens, that the heads read at once in prompts of one
            document; of longer ones the best passage of that length counts. ``None`` for as
            long as the context allows.
        drop_outliers: Whether low tokens are dropped from a document's score, as the paper
            does; fitted weights belong to a score that is linear in the heads, without it.
        calibration: What a score in prompts of one document means as a probability, where that
            was fitted; ``None`` where it was not.
        abstention: When a list is said to hold nothing relevant, where that was fitted.
        first_stage_weight: How much the candidates' order counts where they are ranked: this
            times the natural logarithm of a candidate's rank is taken from its score.
        first_stage_weights: The same where it is known what ranked them.
        first_stage_score_weight: How much a first stage's own scores count where they are handed
            over, in standard deviations; ``None`` where that is not known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    window: int | None = Field(default=None, ge=1)
    reverse: bool = False
    passage_tokens: int | None = Field(default=None, ge=1)
    drop_outliers: bool = True
    calibration: Calibration | None = None
    abstention: Abstention | None = None
    first_stage_weight: NotNegative = 0.0
    first_stage_weights: dict[FirstStage, NotNegative] = Field(default_factory=dict)
    first_stage_score_weight: NotNegative | None = None

    @model_validator(mode="after")
    def _check(self) -> RankingRule:
        if self.calibration is not None and self.window != 1:
            raise ValueError(
                f"a calibration is of scores in windows of 1, but the window is {self.window}"
            )
        if self.abstention is not None and self.calibration is None:
            raise ValueError("an abstention is of calibrated probabilities, and there are none")
        return self

    def order_weight(self, ranked: Ranked) -> float:
        """How much the order of documents counts that come ``ranked``."""
        if isinstance(ranked, bool):
            return self.first_stage_weight if ranked else 0.0
        return self.first_stage_weights.get(ranked, self.first_stage_weight)
