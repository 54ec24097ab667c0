"""How a head set ranks: its prompts, its calibration, and the weight of a first stage."""

from __future__ import annotations

from numbers import Integral
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from core_rerank_integrations.method.scoring import Scores, rank_prior, score_prior
from core_rerank_integrations.method.windows import Layout

FirstStage = Literal["bm25", "dense", "other"]
"""What ordered the documents, best first: BM25, embeddings, or something else."""

SMALLEST_PROBABILITY = 1e-12
"""Probabilities are clipped to this before their log-odds are computed."""


def _whole_number(value: Any) -> Any:
    """Convert the integers of any library, such as NumPy; leave text to pydantic.

    Raises:
        ValueError: The value is a boolean, a fraction or something else.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError("must be an integer")
    return int(value)


Whole = Annotated[int, BeforeValidator(_whole_number)]
Count = Annotated[Whole, Field(ge=1)]
Index = Annotated[Whole, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[Finite, Field(ge=-1e30, le=1e30)]
"""A number of a head set that neither overflows in float32 nor in a sum of products."""
Probability = Annotated[float, Field(ge=0, le=1)]


class Calibration(BaseModel):
    """Platt's logistic map from a document's score to its probability of being relevant.

    Attributes:
        slope: Factor of the score; above 0, so that the order does not change.
        intercept: Added to the product.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    slope: Annotated[Weight, Field(gt=0)]
    intercept: Weight

    def probabilities(self, scores: Scores) -> Scores:
        """Compute ``1 / (1 + exp(-(slope * score + intercept)))``, shape of ``scores``."""
        return logistic(self.slope * scores + self.intercept)


class Abstention(BaseModel):
    """A model of whether a list holds a relevant document, by the margin of its best candidate.

    Some questions raise the scores of all candidates, so the probability of the best one is not
    enough. The feature is the best log-odds minus the mean of the list. The mean of a short list
    is uncertain, so it is shrunk towards the mean of all lists, as if ``candidates`` more
    documents of that mean were in the list. The expected margin grows with the number of
    candidates, which ``size_slope`` corrects.

    Attributes:
        mean: Mean log-odds of candidates over all lists.
        candidates: Number of candidates with that mean that are added to each list.
        slope: Factor of the margin.
        size_slope: Factor of the logarithm of the number of candidates.
        intercept: Added to the sum.
        threshold: Lists below this answerability hold nothing relevant.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: Weight
    candidates: Annotated[Weight, Field(ge=0)]
    slope: Annotated[Weight, Field(gt=0)]
    size_slope: Weight
    intercept: Weight
    threshold: Probability

    def answerability(self, probabilities: npt.ArrayLike) -> float:
        """Compute the probability that a list holds a relevant document; 0 if it is empty.

        Args:
            probabilities: Probabilities of its candidates in any order, shape [candidates].
        """
        odds = log_odds(probabilities)
        if not len(odds):
            return 0.0
        margin = shrunken_margin(odds, self.mean, self.candidates)
        by_size = self.size_slope * np.log(len(odds))
        return float(logistic(self.slope * margin + by_size + self.intercept))


def shrunken_margin(odds: Scores, mean: float, candidates: float) -> float:
    """Compute the best log-odds minus their mean, shrunk towards ``mean``; see `Abstention`."""
    total = odds.sum() + candidates * mean
    return float(odds.max() - total / (len(odds) + candidates))


def logistic(odds: npt.ArrayLike) -> Scores:
    """Convert log-odds of any shape to probabilities."""
    # The hyperbolic tangent does not overflow.
    return 0.5 * (1 + np.tanh(np.asarray(odds, dtype=np.float64) / 2))


def log_odds(probabilities: npt.ArrayLike) -> Scores:
    """Convert probabilities of any shape to log-odds; 0 and 1 are clipped."""
    clipped = np.clip(
        np.asarray(probabilities, dtype=np.float64), SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY
    )
    return np.log(clipped / (1 - clipped))


class ScoringConfig(BaseModel):
    """How a head set ranks; chosen together with the heads.

    Attributes:
        documents_per_prompt: Number of documents in a prompt; ``None`` for as many as fit.
        best_last: Whether a prompt shows its documents in reverse order, so that a first stage's
            best are nearest to the query.
        passage_tokens: In prompts of one document, longer documents are read as passages of this
            number of tokens, and the best passage counts. ``None`` for as long as the context
            allows.
        drop_outliers: Whether low tokens are dropped from a document's score, as in the paper.
            Fitted weights need a score that is linear in the heads, without it.
        calibration: Map from scores in prompts of one document to probabilities, if fitted.
        abstention: Model of whether a list holds a relevant document, if fitted.
        rank_weight: Weight of a first stage's order; see `rank_prior`.
        rank_weights: The same for first stages of a known kind.
        score_weight: Weight of a first stage's own scores, in standard deviations; see
            `score_prior`. ``None`` if it was not fitted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    documents_per_prompt: Count | None = None
    best_last: bool = False
    passage_tokens: Count | None = None
    drop_outliers: bool = True
    calibration: Calibration | None = None
    abstention: Abstention | None = None
    rank_weight: Annotated[Weight, Field(ge=0)] = 0.0
    rank_weights: dict[FirstStage, Annotated[Weight, Field(ge=0)]] = Field(default_factory=dict)
    score_weight: Annotated[Weight, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _check(self) -> ScoringConfig:
        if self.calibration is not None and self.documents_per_prompt != 1:
            raise ValueError(
                "calibration requires documents_per_prompt=1, "
                f"got documents_per_prompt={self.documents_per_prompt}"
            )
        if self.abstention is not None and self.calibration is None:
            raise ValueError("abstention requires calibration")
        return self

    def layout(
        self, max_document_tokens: int | None = None, max_query_tokens: int | None = None
    ) -> Layout:
        """Return how lists become prompts."""
        return Layout(
            self.documents_per_prompt,
            self.best_last,
            self.passage_tokens,
            max_document_tokens,
            max_query_tokens,
        )

    def prior(
        self, count: int, first_stage: FirstStage | None, first_stage_scores: Scores | None = None
    ) -> Scores:
        """Compute what the first stage adds to the scores of its documents.

        A weight for the kind of first stage takes precedence over its scores, and these over
        the order alone.

        Args:
            count: Number of documents.
            first_stage: What ordered them, best first; ``None`` if nothing did.
            first_stage_scores: The first stage's own scores, shape [documents].

        Returns:
            Shape [documents].
        """
        is_known_kind = first_stage in self.rank_weights
        if first_stage_scores is not None and self.score_weight is not None and not is_known_kind:
            return score_prior(first_stage_scores, self.score_weight)
        if first_stage is None:
            return np.zeros(count)
        return rank_prior(count, self.rank_weights.get(first_stage, self.rank_weight))
