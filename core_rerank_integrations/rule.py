"""How a head set ranks: what it wants in a prompt, and how attention becomes scores."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from core_rerank_integrations.scoring import Scores

FirstStage = Literal["bm25", "vectors"]
"""What a first stage may be: a ranking by words in common, or by embeddings."""

Ranked = bool | FirstStage
"""Whether documents come in a first stage's order, its best first; or by which kind of one."""

NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Calibration(BaseModel):
    """From a document's score to the probability that it is relevant (Platt's logistic map).

    Attributes:
        slope: What a score is multiplied by; above 0, so that the order stays.
        intercept: What is added then.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    slope: float = Field(gt=0, allow_inf_nan=False)
    intercept: float = Field(allow_inf_nan=False)

    def probabilities(self, scores: Scores) -> Scores:
        """``1 / (1 + exp(-(slope * score + intercept)))``, shape of ``scores``."""
        # The hyperbolic tangent does not overflow.
        return 0.5 * (1 + np.tanh((self.slope * scores + self.intercept) / 2))


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
    first_stage_weight: NotNegative = 0.0
    first_stage_weights: dict[FirstStage, NotNegative] = Field(default_factory=dict)
    first_stage_score_weight: NotNegative | None = None

    @model_validator(mode="after")
    def _check(self) -> RankingRule:
        if self.calibration is not None and self.window != 1:
            raise ValueError(
                f"a calibration is of scores in windows of 1, but the window is {self.window}"
            )
        return self

    def order_weight(self, ranked: Ranked) -> float:
        """How much the order of documents counts that come ``ranked``."""
        if isinstance(ranked, bool):
            return self.first_stage_weight if ranked else 0.0
        return self.first_stage_weights.get(ranked, self.first_stage_weight)
