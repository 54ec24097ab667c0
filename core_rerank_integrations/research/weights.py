"""Learned weights: which heads to read, and how much each counts, from judged candidates.

The features are each head's calibrated attention mass on a document; the weights are those of a
linear listwise ranker with an L1 penalty, which leaves most heads out (the step that the authors
of arXiv 2510.02219 propose next). A layer cap is a choice of columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from core_rerank_integrations.errors import InvalidInputError, requires_extra
from core_rerank_integrations.heads.head_set import Head
from core_rerank_integrations.heads.scoring_config import Ranked
from core_rerank_integrations.method.scoring import best_indices
from core_rerank_integrations.research.collection import Collection
from core_rerank_integrations.research.features import HeadReader
from core_rerank_integrations.research.measures import MAIN_MEASURE, mean_measures
from core_rerank_integrations.research.sources import Drawn
from core_rerank_integrations.scorer import Candidates, Progress, no_progress

with requires_extra("eval"):
    from scipy.optimize import minimize
    from scipy.special import logsumexp

Array = npt.NDArray[np.float64]

MAX_ITERATIONS = 1000
LEAST_DEVIATION = 0.1
"""A feature counts as deviating at least by this share of the median feature's deviation."""
TINY = 1e-12
DEFAULT_STRENGTHS = (0.003, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05)


class JudgedList(NamedTuple):
    """A query's candidates in their order, with features and judgments.

    Attributes:
        query: Id of the query.
        documents: Ids of the candidates.
        features: Calibrated attention mass, shape [documents, heads].
        grades: Relevance grades, shape [documents].
        ranked: Whether the order is a first stage's, its best first, or of which kind of one.
        first_stage: Scores of that first stage, shape [documents].
    """

    query: str
    documents: tuple[str, ...]
    features: Array
    grades: Array
    ranked: Ranked
    first_stage: Array


def with_contrast(drawn: Drawn, candidates: int) -> Drawn:
    """The queries whose first ``candidates`` hold both a relevant and an irrelevant document.

    A fit learns nothing from the others, so their features need not be read.
    """
    qrels = drawn.collection.qrels
    kept = []
    for query in drawn.queries:
        grades = [qrels[query].get(document, 0) for document, _ in drawn.run[query][:candidates]]
        if max(grades) > 0 >= min(grades):
            kept.append(query)
    return drawn._replace(queries=kept)


def judged_lists(
    reader: HeadReader,
    drawn: Drawn,
    window: int | None,
    candidates: int = 20,
    reverse: bool = False,
    tracked: Progress = no_progress,
) -> list[JudgedList]:
    """Read the features of each query's first ``candidates``; see `HeadReader.read_lists`."""
    _, collection, run, queries = drawn
    first = {query: run[query][:candidates] for query in queries}
    lists = [
        Candidates(
            collection.queries[query],
            tuple(collection.passages[document].content for document, _ in first[query]),
        )
        for query in queries
    ]
    return [
        JudgedList(
            query,
            tuple(document for document, _ in first[query]),
            features.sums.astype(np.float64),
            np.array([max(collection.qrels[query].get(name, 0), 0.0) for name, _ in first[query]]),
            drawn.source.ranked,
            np.array([score for _, score in first[query]]),
        )
        for query, features in zip(
            queries, reader.read_lists(lists, window, reverse, tracked), strict=True
        )
    ]


@dataclass(frozen=True)
class Weights:
    """A fitted linear ranker.

    Attributes:
        heads: One weight per head, most of them 0.
        l1: Strength of the penalty it was fitted with.
    """

    heads: Array
    l1: float

    def scores(self, candidates: JudgedList) -> Array:
        """One score a document; the first stage's order plays no part."""
        scores: Array = candidates.features @ self.heads
        return scores

    def chosen(self, places: Sequence[tuple[int, int]]) -> tuple[Head, ...]:
        """The heads with a weight, strongest first; weights to six digits.

        Args:
            places: (layer, head) of every feature.
        """
        strongest = sorted(np.flatnonzero(self.heads), key=lambda place: -abs(self.heads[place]))
        return tuple(
            Head(
                layer=places[place][0],
                head=places[place][1],
                weight=float(f"{self.heads[place]:.6g}"),
            )
            for place in strongest
        )


def fit_weights(lists: Sequence[JudgedList], l1: float, columns: Array | None = None) -> Weights:
    """Fit weights by listwise cross-entropy over each list's candidates, with an L1 penalty.

    The loss of a list is the cross-entropy between its grades, normalised to 1, and the softmax
    of its scores; lists without a relevant or without an irrelevant candidate teach nothing and
    are left out. Features are scaled to unit deviation, so that the penalty treats all heads
    alike, but a head that hardly looks at documents is not made to shout (`LEAST_DEVIATION`): a
    weight of thousands would magnify what precisions differ by. A first stage's order is no part
    of it: the heads are to rank lists in any order.

    Args:
        lists: Judged candidates with features.
        l1: Strength of the penalty on the sum of absolute weights.
        columns: Which features may be used, boolean, shape [heads]; ``None`` for all.

    Raises:
        InvalidInputError: No list has both a relevant and an irrelevant candidate, or ``l1`` is
            negative.
    """
    if l1 < 0:
        raise InvalidInputError(f"l1 must not be negative, got {l1}")
    contrasted = [item for item in lists if item.grades.any() and not item.grades.all()]
    if not contrasted:
        raise InvalidInputError(
            "no list has both a relevant and an irrelevant candidate: there is nothing to fit on"
        )
    count = contrasted[0].features.shape[1]
    used = np.ones(count, dtype=bool) if columns is None else columns.astype(bool)
    deviation = np.concatenate([item.features for item in contrasted])[:, used].std(axis=0)
    scale = np.maximum(deviation, LEAST_DEVIATION * float(np.median(deviation))) + TINY
    problem = _Listwise.of(contrasted, used, scale)

    def objective(parts: Array) -> tuple[float, Array]:
        # A weight is the difference of two parts that are not negative: the penalty gets a
        # gradient.
        positive, negative = np.split(parts, 2)
        loss, gradient = problem.loss(positive - negative)
        return loss + l1 * float(parts.sum()), np.concatenate((gradient + l1, l1 - gradient))

    solution = minimize(
        objective,
        np.zeros(2 * len(scale)),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0.0, None)] * (2 * len(scale)),
        options={"maxiter": MAX_ITERATIONS},
    )
    positive, negative = np.split(solution.x, 2)
    heads = np.zeros(count)
    heads[used] = (positive - negative) / scale
    return Weights(heads, l1)


Judges = Sequence[tuple[Collection, Sequence[JudgedList]]]
"""Lists to choose by, with their collections; each counts the same, however many lists it has."""


class Trial(NamedTuple):
    """One strength of the penalty, and what it gives on the lists that choose."""

    weights: Weights
    num_heads: int
    score: float


def choose_weights(
    train: Sequence[JudgedList],
    dev: Judges,
    strengths: Sequence[float],
    columns: Array | None = None,
    max_heads: int | None = None,
    progress: Callable[[Trial], None] = lambda _: None,
) -> tuple[Trial, list[Trial]]:
    """Fit with each strength of the penalty; the best by mean nDCG@10 on ``dev`` wins.

    Args:
        train: Lists to fit on.
        dev: Lists to choose by.
        strengths: Of the penalty.
        columns: As for `fit_weights`.
        max_heads: Fits with more heads are passed over.
        progress: Told of each trial.

    Returns:
        The best trial, of equals the one with fewer heads, and all of them.

    Raises:
        InvalidInputError: Every trial has more than ``max_heads`` heads, or none at all.
    """
    trials = []
    for l1 in sorted(strengths, reverse=True):
        weights = fit_weights(train, l1, columns)
        scores = [
            mean_ndcg(collection, [(item, weights.scores(item)) for item in lists])
            for collection, lists in dev
        ]
        trials.append(Trial(weights, int(np.count_nonzero(weights.heads)), float(np.mean(scores))))
        progress(trials[-1])
    allowed = [
        trial for trial in trials if trial.num_heads and trial.num_heads <= (max_heads or np.inf)
    ]
    if not allowed:
        raise InvalidInputError(
            f"none of the strengths {sorted(strengths)} leaves between 1 and {max_heads} heads; "
            f"they leave {sorted(trial.num_heads for trial in trials)}"
        )
    return max(allowed, key=lambda trial: (round(trial.score, 6), -trial.num_heads)), trials


def mean_ndcg(collection: Collection, scored: Sequence[tuple[JudgedList, Array]]) -> float:
    """Mean nDCG@10 of lists that are ordered by the scores beside them."""
    qrels = {item.query: collection.qrels[item.query] for item, _ in scored}
    run = {
        item.query: [item.documents[place] for place in best_indices(scores, len(scores))]
        for item, scores in scored
    }
    return mean_measures(qrels, run)[MAIN_MEASURE]


@dataclass(frozen=True)
class _Listwise:
    """Cross-entropy of padded lists, and its gradient."""

    features: Array
    """[lists, documents, features], scaled; padding is 0."""
    targets: Array
    """[lists, documents]; each list sums to 1."""
    mask: npt.NDArray[np.bool_]
    """[lists, documents]; False where padded."""

    @classmethod
    def of(
        cls, lists: Sequence[JudgedList], used: npt.NDArray[np.bool_], scale: Array
    ) -> _Listwise:
        longest = max(len(item.documents) for item in lists)
        features = np.zeros((len(lists), longest, len(scale)))
        targets = np.zeros((len(lists), longest))
        mask = np.zeros((len(lists), longest), dtype=bool)
        for row, item in enumerate(lists):
            length = len(item.documents)
            features[row, :length] = item.features[:, used]
            targets[row, :length] = item.grades / item.grades.sum()
            mask[row, :length] = True
        return cls(features / scale, targets, mask)

    def loss(self, weights: Array) -> tuple[float, Array]:
        logits = np.where(self.mask, self.features @ weights, -np.inf)
        log_shares = logits - logsumexp(logits, axis=1, keepdims=True)
        shares = np.exp(log_shares)
        loss = -np.sum(self.targets * np.where(self.mask, log_shares, 0.0))
        residual = (shares - self.targets) / len(self.targets)
        gradient = np.tensordot(residual, self.features, axes=([0, 1], [0, 1]))
        return float(loss) / len(self.targets), gradient
