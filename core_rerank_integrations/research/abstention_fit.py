"""When nothing in a list is relevant: fitted on lists whose relevant documents were taken out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from core_rerank_integrations._internal.progress import tracked
from core_rerank_integrations.errors import InvalidInputError, requires_extra
from core_rerank_integrations.heads.head_set import HeadSet
from core_rerank_integrations.heads.scoring_config import Abstention, distance, log_odds, logistic
from core_rerank_integrations.models.resolve import DEFAULT_MODEL
from core_rerank_integrations.reranker import CoReReranker
from core_rerank_integrations.research.fit_evidence import answers_of, holds_any
from core_rerank_integrations.research.sources import Drawn, JudgedRun, draw

with requires_extra("eval"):
    from scipy.optimize import minimize

Array = npt.NDArray[np.float64]

SIZES = (1, 2, 3, 5, 10)
"""Of shorter lists that are fitted on beside those as they come."""
LOST = 0.01
"""Share of the lists with something relevant that may come back empty."""


class JudgedOdds(NamedTuple):
    """Log-odds of a list's candidates.

    Attributes:
        relevant: Of those that are relevant, one or more.
        others: Of the rest, one or more.
    """

    relevant: Array
    others: Array

    def shortened(self, size: int, draw_from: random.Random) -> JudgedOdds:
        """One that is relevant, and ``size`` others."""
        others = draw_from.sample(self.others.tolist(), min(size, len(self.others)))
        return JudgedOdds(self.relevant[:1], np.array(others))

    def lists(self) -> tuple[Array, Array]:
        """With something relevant, and as long without; one other has to make room for it."""
        kept = self.others[: max(len(self.others) - len(self.relevant), 0)]
        return np.concatenate((self.relevant, kept)), self.others


def judged_odds(
    drawn: Drawn, reranker: CoReReranker, candidates: int = 20, show_progress: bool = False
) -> list[JudgedOdds]:
    """What a reranker says about the candidates of each question.

    Where questions come with answers, what holds one and was not judged is left out; so are lists
    with nothing relevant, or nothing else.

    Args:
        drawn: Questions and their candidates.
        reranker: Of heads that are calibrated.
        candidates: How many a question.
        show_progress: Whether a bar on standard error says how far this is.
    """
    collection, run, queries = drawn.collection, drawn.run, drawn.queries
    answers = answers_of(drawn.source.folder)
    judged = []
    for query in tracked(queries, len(queries), "Reading") if show_progress else queries:
        grades = collection.qrels[query]
        texts, relevant = [], []
        for name, _ in run[query][:candidates]:
            text = collection.passages[name].content
            is_relevant = grades.get(name, 0) > 0
            if is_relevant or not holds_any(answers[query], text):
                texts.append(text)
                relevant.append(is_relevant)
        if all(relevant) or not any(relevant):
            continue
        results = reranker.rerank(collection.queries[query], texts)
        found = {result.index: result.probability or 0.0 for result in results}
        odds = log_odds([found[place] for place in range(len(texts))])
        places = np.array(relevant)
        judged.append(JudgedOdds(odds[places], odds[~places]))
    return judged


def fit_rule(
    groups: Sequence[Sequence[JudgedOdds]], lost: float = LOST, seed: int = 0
) -> Abstention:
    """Fit when a list is said to hold nothing relevant, by logistic loss.

    Half of the lists hold something relevant, the other half are the same ones without. Beside the
    lists as they come stand shorter ones (`SIZES`), each length counting alike.

    Args:
        groups: Of each collection, its lists; each counts the same, however many it has.
        lost: Share of the lists with something relevant that may come back empty.
        seed: Of what is drawn for shorter lists.

    Raises:
        InvalidInputError: There is no list, or ``lost`` is not between 0 and 1.
    """
    _check_lost(lost)
    if not any(groups):
        raise InvalidInputError(
            "no list holds both relevant and irrelevant candidates: there is nothing to fit on"
        )
    mean, candidates = _drawn_mean([item.others for group in groups for item in group])
    rows, answers, weights = [], [], []
    for group in groups:
        draw_from = random.Random(seed)
        for items in (
            group,
            *([item.shortened(size, draw_from) for item in group] for size in SIZES),
        ):
            for item in items:
                for answered, odds in zip((1.0, 0.0), item.lists(), strict=True):
                    rows.append((distance(odds, mean, candidates), np.log(len(odds)), 1.0))
                    answers.append(answered)
                    weights.append(1 / len(items))
    features, signs = np.array(rows), 1 - 2 * np.array(answers)
    shares = np.array(weights) / sum(weights)

    def loss(line: Array) -> float:
        return float(shares @ np.logaddexp(0, signs * (features @ line)))

    line = minimize(loss, [1.0, 0.0, 0.0], bounds=[(1e-6, None), (None, None), (None, None)]).x
    slope, size_slope, intercept = line
    holding = signs < 0
    found = logistic(features[holding] @ line)
    threshold = np.quantile(found, lost, weights=shares[holding], method="inverted_cdf")
    return Abstention(
        mean=mean,
        candidates=candidates,
        slope=float(slope),
        size_slope=float(size_slope),
        intercept=float(intercept),
        threshold=float(threshold),
    )


def _check_lost(lost: float) -> None:
    if not 0 <= lost <= 1:
        raise InvalidInputError(f"lost must be between 0 and 1, got {lost}")


def _drawn_mean(lists: Sequence[Array]) -> tuple[float, float]:
    """The mean of all lists, and how many candidates of it a list's own mean is worth less.

    James and Stein's estimator: the variance within lists over that between their means.
    """
    means = np.array([odds.mean() for odds in lists])
    longer = [odds for odds in lists if len(odds) > 1]
    within = float(np.mean([odds.var(ddof=1) for odds in longer])) if longer else 0.0
    by_chance = within * float(np.mean([1 / len(odds) for odds in lists]))
    between = max(float(means.var()) - by_chance, 1e-3 * within)
    return float(means.mean()), within / between if between else 0.0


def fit_abstention(
    heads: HeadSet,
    sources: Sequence[JudgedRun],
    model: str | Path = DEFAULT_MODEL,
    *,
    candidates: int = 20,
    lost: float = LOST,
    seed: int = 0,
    backend: str = "auto",
    dtype: str = "auto",
    show_progress: bool = False,
) -> HeadSet:
    """A head set that knows when nothing in a list is relevant: `CoReReranker.answerable`.

    Args:
        heads: The head set, calibrated; how it ranks stays as it is.
        sources: Judged candidates, each source counting alike.
        model: The model of the heads.
        candidates: Candidates a question.
        lost: See `fit_rule`.
        seed: Seed of the drawing.
        backend: As for `CoReReranker`.
        dtype: As for `CoReReranker`.
        show_progress: Whether bars on standard error say how far this is.

    Raises:
        InvalidInputError: A collection cannot be read, there is nothing to fit on, ``lost`` is not
            between 0 and 1, or the heads are not calibrated.
        HeadSetError: The heads are not this model's.
    """
    if heads.scoring.calibration is None:
        raise InvalidInputError(
            f"the heads {heads.name!r} are not calibrated; `core-rerank heads fit --window 1` "
            "makes such as are"
        )
    _check_lost(lost)  # Before what takes long.
    drawn = draw(sources, seed)
    with CoReReranker(model, heads, backend=backend, dtype=dtype) as reranker:
        groups = [judged_odds(source, reranker, candidates, show_progress) for source in drawn]
    details = {**heads.provenance.details, "abstention": [source.label for source in drawn]}
    provenance = heads.provenance.model_copy(update={"details": details})
    fitted = heads.with_scoring(abstention=fit_rule(groups, lost, seed))
    return fitted.model_copy(update={"provenance": provenance})
