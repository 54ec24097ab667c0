"""Fitting an abstention, on lists with and without their relevant documents."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from core_rerank_integrations._internal.progress import Progress, no_progress, progress_bar
from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.heads.head_set import HeadSet
from core_rerank_integrations.heads.scoring_config import (
    Abstention,
    log_odds,
    logistic,
    shrunken_margin,
)
from core_rerank_integrations.heads.shipped import head_set_for
from core_rerank_integrations.reranker import CoReReranker
from core_rerank_integrations.research.collection import has_contrast
from core_rerank_integrations.research.options import AbstentionOptions
from core_rerank_integrations.research.scoring_fit import fit_logistic
from core_rerank_integrations.research.sources import Sample, draw_samples
from core_rerank_integrations.research.weights import Array

SIZES = (1, 2, 3, 5, 10)
"""Numbers of irrelevant candidates in the shorter lists that are also fitted on."""
CANDIDATES = (0.3, 1.0, 3.0, 10.0, 30.0)
"""Numbers of candidates with the mean of all lists that are tried (`Abstention.candidates`). With
few, the best candidate is compared with its list; with many, with all lists."""


class JudgedLogOdds(NamedTuple):
    """Log-odds of the candidates of one list.

    Attributes:
        relevant: Log-odds of the relevant candidates; empty if there is none.
        others: Log-odds of the other candidates, shape [at least 1].
    """

    relevant: Array
    others: Array

    def shortened(self, size: int, generator: random.Random) -> JudgedLogOdds:
        """Return one relevant candidate and a sample of at most ``size`` others."""
        others = generator.sample(self.others.tolist(), min(size, len(self.others)))
        return JudgedLogOdds(self.relevant[:1], np.array(others))

    def lists(self) -> tuple[Array, Array]:
        """Return the log-odds of a list with relevant candidates and of one without.

        The lists have the same length: relevant candidates replace others.
        """
        kept = self.others[: max(len(self.others) - len(self.relevant), 0)]
        return np.concatenate((self.relevant, kept)), self.others


def judged_log_odds(
    sample: Sample, reranker: CoReReranker, candidates: int, progress: Progress = no_progress
) -> list[JudgedLogOdds]:
    """Compute the log-odds of the candidates of each question.

    If questions come with answers, unjudged candidates that contain an answer are left out. So
    are lists without an irrelevant candidate, and those that lack the relevant documents of their
    question.

    Args:
        sample: Questions and their candidates.
        reranker: A reranker with calibrated heads.
        candidates: Maximum number of candidates per question.
        progress: Wraps the questions.
    """
    collection = sample.collection
    judged = []
    for query in progress(sample.queries, len(sample.queries)):
        grades = collection.qrels[query]
        texts, is_relevant = [], []
        for name, _ in sample.run[query][:candidates]:
            text = collection.passages[name].content
            if grades.get(name, 0) > 0 or not collection.has_answer(query, text):
                texts.append(text)
                is_relevant.append(grades.get(name, 0) > 0)
        if shows_answerability(is_relevant, grades):
            results = reranker.rerank(collection.queries[query], texts)
            by_index = sorted(results, key=lambda result: result.index)
            odds = log_odds([result.probability or 0.0 for result in by_index])
            relevant = np.array(is_relevant)
            judged.append(JudgedLogOdds(odds[relevant], odds[~relevant]))
    return judged


def shows_answerability(is_relevant: Sequence[bool], grades: Mapping[str, float]) -> bool:
    """Return whether a list has irrelevant candidates, and relevant ones if its question has any.

    Args:
        is_relevant: Whether each candidate is relevant.
        grades: Judgments of the question. Without a relevant document, nothing answers it.
    """
    holds_nothing = bool(is_relevant) and not any(grade > 0 for grade in grades.values())
    return has_contrast(is_relevant) or holds_nothing


def fit_answerability(
    groups: Sequence[Sequence[JudgedLogOdds]], max_false_abstentions: float = 0.01, seed: int = 0
) -> Abstention:
    """Fit the model of a list's answerability by logistic loss, and its threshold.

    Half of the lists hold a relevant document; the other half are the same lists without it.
    Shorter lists (`SIZES`) are fitted on as well; each length counts alike. Of `CANDIDATES`, the
    number with the lowest loss is kept.

    Args:
        groups: The lists of each collection. Each collection counts alike, however many lists it
            has.
        max_false_abstentions: Share of the lists with a relevant document that may be lost.
        seed: Seed of the samples for shorter lists.

    Raises:
        InvalidInputError: No list has a relevant candidate.
    """
    if not any(len(item.relevant) for group in groups for item in group):
        raise InvalidInputError(
            "no list holds both relevant and irrelevant candidates: there is nothing to fit on"
        )
    mean = float(np.mean([item.others.mean() for group in groups for item in group]))
    lists = list(_lists(groups, seed))
    fits = [_fit(lists, mean, candidates) for candidates in CANDIDATES]
    best = min(fits, key=lambda fit: fit.loss)
    threshold = np.quantile(
        best.answerability[best.is_answered],
        max_false_abstentions,
        weights=best.weights[best.is_answered],
        method="inverted_cdf",
    )
    slope, size_slope, intercept = best.line.tolist()
    return Abstention(
        mean=mean,
        candidates=best.candidates,
        slope=slope,
        size_slope=size_slope,
        intercept=intercept,
        threshold=float(threshold),
    )


class _WeightedList(NamedTuple):
    odds: Array
    is_answered: bool
    weight: float


class _Fit(NamedTuple):
    """A logistic fit; the last three fields have one value per list."""

    candidates: float
    loss: float
    line: Array
    answerability: Array
    is_answered: npt.NDArray[np.bool_]
    weights: Array


def _lists(groups: Sequence[Sequence[JudgedLogOdds]], seed: int) -> Iterator[_WeightedList]:
    """Yield the lists to fit on, whole and shortened, with and without relevant candidates."""
    for group in groups:
        generator = random.Random(seed)
        for items in (
            group,
            *([item.shortened(size, generator) for item in group] for size in SIZES),
        ):
            for item in items:
                for answered, odds in zip((True, False), item.lists(), strict=True):
                    if len(item.relevant) or not answered:
                        yield _WeightedList(odds, answered, 1 / len(items))


def _fit(lists: Sequence[_WeightedList], mean: float, candidates: float) -> _Fit:
    rows, answers, weights = [], [], []
    for item in lists:
        rows.append((shrunken_margin(item.odds, mean, candidates), np.log(len(item.odds)), 1.0))
        answers.append(item.is_answered)
        weights.append(item.weight)
    features, is_answered = np.array(rows), np.array(answers)
    shares = np.array(weights) / sum(weights)
    line = fit_logistic(features, is_answered, shares)
    logits = features @ line
    loss = float(shares @ np.logaddexp(0, np.where(is_answered, -logits, logits)))
    return _Fit(candidates, loss, line, logistic(logits), is_answered, shares)


def fit_abstention(options: AbstentionOptions, *, show_progress: bool = False) -> HeadSet:
    """Add an abstention to a head set, by which it computes the answerability of a list.

    Args:
        options: The head set, the model and the data.
        show_progress: Whether to show progress bars on standard error.

    Returns:
        The head set; its ranking does not change.

    Raises:
        InvalidInputError: A collection cannot be read, there is nothing to fit on, or the heads
            are not calibrated.
        HeadSetError: There is no such head set, or it belongs to another model.
        ModelError: The model cannot be found, downloaded, or read exactly.
    """
    heads = head_set_for(options.heads, None)
    if heads.scoring.calibration is None:
        raise InvalidInputError(
            f"the heads {heads.name!r} are not calibrated; fit calibrated heads with "
            "`core-rerank heads fit --documents-per-prompt 1`"
        )
    samples = draw_samples(options.lists, options.seed)
    progress = progress_bar(show_progress, "Reading")
    with CoReReranker(options.model, heads, **options.runtime) as reranker:
        groups = [
            judged_log_odds(sample, reranker, options.candidates, progress) for sample in samples
        ]
    details = {**heads.provenance.details, "abstention": [sample.label for sample in samples]}
    provenance = heads.provenance.model_copy(update={"details": details})
    abstention = fit_answerability(groups, options.max_false_abstentions, options.seed)
    return heads.with_scoring(abstention=abstention).model_copy(update={"provenance": provenance})
