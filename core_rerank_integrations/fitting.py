"""Learned weights: which heads to read, and how much each counts, from judged candidates.

The features are each head's calibrated attention mass on a document; the weights are those of a
linear listwise ranker with an L1 penalty, which leaves most heads out (the step that the authors
of arXiv 2510.02219 propose next). A layer cap is a choice of columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from core_rerank_integrations.collection import Collection, Run
from core_rerank_integrations.errors import InvalidInputError, requires_extra
from core_rerank_integrations.evaluation import mean_measures
from core_rerank_integrations.features import Batch, HeadReader
from core_rerank_integrations.heads import Calibration, Head, HeadSet
from core_rerank_integrations.reading import Candidates
from core_rerank_integrations.scoring import best_places

with requires_extra("eval"):
    from scipy.optimize import minimize
    from scipy.special import logsumexp

Array = npt.NDArray[np.float64]

MAX_ITERATIONS = 1000
DEFAULT_STRENGTHS = (0.003, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05)


class JudgedList(NamedTuple):
    """A query's candidates in their order, with features and judgments.

    Attributes:
        query: Id of the query.
        documents: Ids of the candidates.
        features: Calibrated attention mass, shape [documents, heads].
        grades: Relevance grades, shape [documents].
        ordered: Whether the order is a first stage's, best first.
    """

    query: str
    documents: tuple[str, ...]
    features: Array
    grades: Array
    ordered: bool


def teaching(
    collection: Collection, run: Run, queries: Sequence[str], candidates: int
) -> list[str]:
    """The queries whose first ``candidates`` hold both a relevant and an irrelevant document.

    A fit learns nothing from the others, so their features need not be read.
    """
    kept = []
    for query in queries:
        grades = [collection.qrels[query].get(document, 0) for document in run[query][:candidates]]
        if max(grades) > 0 >= min(grades):
            kept.append(query)
    return kept


def judged_lists(
    reader: HeadReader,
    collection: Collection,
    run: Run,
    queries: Sequence[str],
    window: int | None,
    candidates: int = 20,
    ordered: bool = True,
    reverse: bool = False,
    tracked: Callable[[list[Batch]], Iterable[Batch]] = iter,
) -> list[JudgedList]:
    """Read the features of each query's first ``candidates``; see `HeadReader.read_lists`."""
    documents = {query: tuple(run[query][:candidates]) for query in queries}
    lists = [
        Candidates(
            collection.queries[query],
            tuple(collection.passages[document].content for document in documents[query]),
        )
        for query in queries
    ]
    return [
        JudgedList(
            query,
            documents[query],
            features.sums.astype(np.float64),
            np.array([max(collection.qrels[query].get(name, 0), 0.0) for name in documents[query]]),
            ordered,
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
        first_stage: Weight of ``-ln(rank)``.
        l1: Strength of the penalty it was fitted with.
    """

    heads: Array
    first_stage: float
    l1: float

    def head_scores(self, candidates: JudgedList) -> Array:
        """One score a document, by the heads alone."""
        scores: Array = candidates.features @ self.heads
        return scores

    def scores(self, candidates: JudgedList) -> Array:
        """One score a document, the first stage's order included."""
        return self.head_scores(candidates) + self.first_stage * _prior(candidates)

    def rank(self, candidates: JudgedList) -> list[str]:
        """Document ids, best first."""
        return _in_order(candidates, self.scores(candidates))

    def head_set(self, places: Sequence[tuple[int, int]], **fields: object) -> HeadSet:
        """The heads with a weight, strongest first; weights to six digits.

        Args:
            places: (layer, head) of every feature.
            **fields: The other fields of the `HeadSet`.
        """
        chosen = sorted(np.flatnonzero(self.heads), key=lambda place: -abs(self.heads[place]))
        heads = tuple(
            Head(
                layer=places[place][0],
                head=places[place][1],
                weight=float(f"{self.heads[place]:.6g}"),
            )
            for place in chosen
        )
        return HeadSet.model_validate(
            {
                "method": "fit",
                "heads": heads,
                "drop_outliers": False,
                "first_stage_weight": float(f"{self.first_stage:.6g}"),
                **fields,
            }
        )


def fit_weights(
    lists: Sequence[JudgedList], l1: float, columns: Array | None = None, fuse: bool = True
) -> Weights:
    """Fit weights by listwise cross-entropy over each list's candidates, with an L1 penalty.

    The loss of a list is the cross-entropy between its grades, normalised to 1, and the softmax
    of its scores; lists without a relevant or without an irrelevant candidate teach nothing and
    are left out. Features are scaled to unit deviation, so that the penalty treats all heads
    alike. The first stage's weight is not penalised.

    Args:
        lists: Judged candidates with features.
        l1: Strength of the penalty on the sum of absolute weights.
        columns: Which features may be used, boolean, shape [heads]; ``None`` for all.
        fuse: Whether the first stage's order is part of the score.

    Raises:
        InvalidInputError: No list has both a relevant and an irrelevant candidate, or ``l1`` is
            negative.
    """
    if l1 < 0:
        raise InvalidInputError(f"l1 must not be negative, got {l1}")
    taught = [item for item in lists if item.grades.any() and not item.grades.all()]
    if not taught:
        raise InvalidInputError(
            "no list has both a relevant and an irrelevant candidate: there is nothing to fit on"
        )
    count = taught[0].features.shape[1]
    used = np.ones(count, dtype=bool) if columns is None else columns.astype(bool)
    fused = fuse and any(item.ordered for item in taught)
    deviation = np.concatenate([item.features for item in taught])[:, used].std(axis=0)
    scale = np.append(np.where(deviation > 0, deviation, 1.0), 1.0)
    problem = _Listwise.of(taught, used, scale)
    penalty = np.append(np.full(int(used.sum()), l1), 0.0)
    # A weight is the difference of two parts that are not negative: the penalty gets a gradient.
    bounds: list[tuple[float, float | None]] = [(0.0, None)] * (2 * len(penalty))
    if not fused:
        bounds[len(penalty) - 1] = (0.0, 0.0)
    bounds[-1] = (0.0, 0.0)  # The first stage never counts against a document.

    def objective(parts: Array) -> tuple[float, Array]:
        positive, negative = np.split(parts, 2)
        loss, gradient = problem.loss(positive - negative)
        return (
            loss + float(penalty @ (positive + negative)),
            np.concatenate((gradient + penalty, penalty - gradient)),
        )

    solution = minimize(
        objective,
        np.zeros(2 * len(penalty)),
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options={"maxiter": MAX_ITERATIONS},
    )
    positive, negative = np.split(solution.x, 2)
    fitted = (positive - negative) / scale
    heads = np.zeros(count)
    heads[used] = fitted[:-1]
    return Weights(heads, float(fitted[-1]), l1)


class Trial(NamedTuple):
    """One strength of the penalty, and what it gives on the lists that choose."""

    weights: Weights
    num_heads: int
    score: float


def choose_weights(
    train: Sequence[JudgedList],
    dev: Mapping[str, tuple[Collection, Sequence[JudgedList]]],
    strengths: Sequence[float],
    columns: Array | None = None,
    fuse: bool = True,
    max_heads: int | None = None,
    progress: Callable[[Trial], None] = lambda _: None,
) -> tuple[Trial, list[Trial]]:
    """Fit with each strength of the penalty; the best by mean nDCG@10 on ``dev`` wins.

    Args:
        train: Lists to fit on.
        dev: Lists to choose by; each collection counts the same, however many lists it has.
        strengths: Of the penalty.
        columns: As for `fit_weights`.
        fuse: As for `fit_weights`.
        max_heads: Fits with more heads are passed over.
        progress: Told of each trial.

    Returns:
        The best trial, of equals the one with fewer heads, and all of them.

    Raises:
        InvalidInputError: Every trial has more than ``max_heads`` heads, or none at all.
    """
    trials = []
    for l1 in sorted(strengths, reverse=True):
        weights = fit_weights(train, l1, columns, fuse)
        scores = []
        for collection, lists in dev.values():
            qrels = {item.query: collection.qrels[item.query] for item in lists}
            run = {item.query: weights.rank(item) for item in lists}
            scores.append(mean_measures(qrels, run)["nDCG@10"])
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


def _in_order(candidates: JudgedList, scores: Array) -> list[str]:
    return [candidates.documents[place] for place in best_places(scores, len(scores))]


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
            features[row, :length, :-1] = item.features[:, used]
            features[row, :length, -1] = _prior(item)
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


def _prior(item: JudgedList) -> Array:
    """``-ln(rank)`` where the order means something."""
    ranks = np.arange(1, len(item.documents) + 1)
    return -np.log(ranks) if item.ordered else np.zeros(len(ranks))
