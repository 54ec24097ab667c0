"""From scores to results, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core_rerank_integrations import HeadSet
from core_rerank_integrations.errors import CoReError, InvalidInputError
from core_rerank_integrations.heads.scoring_config import ScoringConfig
from core_rerank_integrations.method.list_scores import ScoredList
from core_rerank_integrations.ranking import check_candidates, check_options, rank
from core_rerank_integrations.research.methods import Method
from core_rerank_integrations.research.options import FindOptions, FitOptions
from core_rerank_integrations.research.sources import JudgedRun
from core_rerank_integrations.results import RerankResults
from core_rerank_integrations.settings import DocumentCache, RerankerSettings, RerankOptions

DOCUMENTS = ["a", "b", "c", "d"]
PLAIN = ScoringConfig(rank_weight=1.0, score_weight=2.0, rank_weights={"dense": 3.0})
CALIBRATED = ScoringConfig(
    documents_per_prompt=1,
    calibration={"slope": 1.0, "intercept": 0.0},
    abstention={
        "mean": 0, "candidates": 0, "slope": 1, "size_slope": 0, "intercept": -2, "threshold": 0.5,
    },
)  # fmt: skip


def ranked(
    scores: list[float],
    scoring: ScoringConfig = PLAIN,
    first_stage_scores: list[float] | None = None,
    **options: Any,
) -> RerankResults:
    count = len(scores)
    candidates = check_candidates("q", DOCUMENTS[:count], first_stage_scores)
    scored = ScoredList(np.array(scores), [None] * count, [[] for _ in scores])
    return rank(candidates, scored, scoring, RerankOptions(**options))


def order(results: RerankResults) -> str:
    return "".join(result.document for result in results)


def test_results_are_sorted_and_ties_keep_their_order() -> None:
    results = ranked([1.0, 3.0, 1.0, 2.0])
    assert order(results) == "bdac"
    assert [result.index for result in results] == [1, 3, 0, 2]
    assert results[:2] == [results[0], results[1]]
    assert order(ranked([1.0, 3.0, 1.0, 2.0], top_n=2)) == "bd"


def test_the_first_stage_counts_by_its_kind_then_its_scores_then_its_order() -> None:
    zeros = [0.0] * 4
    scores = [1.0, 2.0, 3.0, 4.0]
    z_scores = (np.array(scores) - 2.5) / np.std(scores)
    for options, expected in (
        ({}, [0, 0, 0, 0]),
        ({"first_stage": "other"}, -np.log([1, 2, 3, 4])),
        ({"first_stage": "bm25"}, -np.log([1, 2, 3, 4])),
        ({"first_stage": "dense"}, -3 * np.log([1, 2, 3, 4])),
        ({"first_stage": "other", "first_stage_scores": scores}, 2 * z_scores),
        ({"first_stage_scores": scores}, 2 * z_scores),
        ({"first_stage": "bm25", "first_stage_scores": scores}, 2 * z_scores),
        ({"first_stage": "dense", "first_stage_scores": scores}, -3 * np.log([1, 2, 3, 4])),
    ):
        by_index = sorted(ranked(zeros, **options), key=lambda result: result.index)
        np.testing.assert_allclose([result.score for result in by_index], expected, atol=1e-12)


@pytest.mark.parametrize("kind", [np.int64, np.int8, np.uint32, int])
def test_counts_are_integers_of_any_library(kind: type) -> None:
    assert RerankOptions.checked(top_n=kind(2)) == RerankOptions(top_n=2)
    settings = RerankerSettings.checked(documents_per_prompt=kind(3), heads=[(kind(1), kind(2))])
    assert settings.documents_per_prompt == 3
    assert DocumentCache(memory_bytes=kind(0)).memory_bytes == 0
    assert FindOptions.checked(data=[], seed=kind(7), questions=kind(1)).seed == 7
    assert HeadSet.from_pairs([(kind(1), kind(2))]) == HeadSet.from_pairs([(1, 2)])


@pytest.mark.parametrize("wrong", [True, np.True_, 2.0, np.float32(2), np.array([2, 3]), [2]])
def test_counts_are_nothing_else(wrong: Any) -> None:
    for refused in (
        lambda: RerankOptions.checked(top_n=wrong),
        lambda: RerankerSettings.checked(max_document_tokens=wrong),
        lambda: FindOptions.checked(data=[], candidates=wrong, positions=wrong),
        lambda: FitOptions.checked(train=[JudgedRun(Path(), "", Path(), wrong)], dev=[]),
        lambda: HeadSet.from_pairs([(1, wrong)]),
        lambda: HeadSet.from_pairs([(1, 2)]).with_scoring(documents_per_prompt=wrong),
    ):
        with pytest.raises(CoReError, match="integer"):
            refused()


@pytest.mark.parametrize("wrong", [0, False, True, 1, "", "vectors"])
def test_a_first_stage_that_is_none_of_the_kinds_never_counts(wrong: Any) -> None:
    with pytest.raises(InvalidInputError, match="first_stage: Input should be 'bm25', 'dense' or"):
        RerankOptions.checked(first_stage=wrong)
    with pytest.raises(ValueError, match="first_stage"):
        Method("core", HeadSet.from_pairs([(1, 2)]), first_stage=wrong)
    with pytest.raises(InvalidInputError, match="train"):
        FitOptions.checked(train=[JudgedRun(Path(), "", Path(), None, wrong)], dev=[])


def test_probabilities_leave_out_the_first_stage() -> None:
    weighted = CALIBRATED.model_copy(update={"rank_weight": 9.0})
    results = ranked([0.0, 2.0], weighted, first_stage="other")
    assert order(results) == "ab"
    assert [result.relevance_score for result in results] == pytest.approx(
        [0.5, 1 / (1 + np.exp(-2))]
    )


def test_thresholds() -> None:
    assert order(ranked([1.0, 3.0, -1.0], min_score=1.0)) == "ba"
    assert order(ranked([1.0, 3.0, -1.0], CALIBRATED, score_threshold=0.5)) == "ba"
    assert order(ranked([1.0, 3.0, -1.0], CALIBRATED, score_threshold=0.5, min_score=2.0)) == "b"
    with pytest.raises(InvalidInputError, match="not calibrated; use min_score"):
        check_options(RerankOptions(score_threshold=0.5), PLAIN)
    with pytest.raises(InvalidInputError, match="cannot tell whether"):
        check_options(RerankOptions(score_threshold="auto"), PLAIN)
    check_options(RerankOptions(score_threshold="auto", min_score=0.1), CALIBRATED)


def test_answerability_belongs_to_the_whole_list() -> None:
    wide, narrow = [6.0, 0.0, 0.0], [1.0, 0.0, 0.0]
    results = ranked(wide, CALIBRATED, top_n=1)
    assert results.answerability == pytest.approx(1 / (1 + np.exp(2 - 4)))
    assert order(ranked(wide, CALIBRATED, score_threshold="auto")) == "abc"
    empty = ranked(narrow, CALIBRATED, score_threshold="auto")
    assert len(empty) == 0
    assert empty.answerability == pytest.approx(1 / (1 + np.exp(2 - 2 / 3)))
    assert ranked(narrow).answerability is None


def test_documents_that_were_not_read_come_last_whatever_the_threshold() -> None:
    results = ranked([-np.inf, 1.0, -np.inf, 9.0], CALIBRATED, score_threshold=0.9)
    assert order(results) == "dac"
    assert [result.reranked for result in results] == [True, False, False]
    assert [result.probability for result in results[1:]] == [None, None]
    unread = ranked([-np.inf, -np.inf], CALIBRATED, score_threshold="auto")
    assert (order(unread), unread.answerability, unread.answerable) == ("ab", None, None)
    assert ranked([], CALIBRATED).answerable is False, "an empty list answers nothing"
