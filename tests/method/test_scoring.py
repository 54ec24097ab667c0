from __future__ import annotations

import numpy as np
import pytest

from core_rerank_integrations.method.prompt import Span
from core_rerank_integrations.method.scoring import (
    best_indices,
    document_scores,
    rank_prior,
    score_prior,
)


def test_sums_the_difference_of_query_and_baseline() -> None:
    query = np.array([9.0, 0.3, 0.4, 0.5, 9.0], dtype=np.float32)
    baseline = np.array([1.0, 0.1, 0.1, 0.1, 1.0], dtype=np.float32)
    assert document_scores(query, baseline, [Span(1, 4)]) == pytest.approx([0.9])


def test_drops_low_outliers_of_the_document_itself() -> None:
    tokens = np.array([1.0] * 9 + [-10.0], dtype=np.float32)
    # Mean -0.1, unbiased deviation 3.479: the floor is -7.06, and -10 is below it.
    assert document_scores(tokens, np.zeros(10, np.float32), [Span(0, 10)]) == [9.0]


def test_keeps_outliers_within_two_unbiased_deviations() -> None:
    # With the biased deviation (2.0) the floor would be -4.0, and the -4 dropped.
    tokens = np.array([1.0, 1.0, 1.0, 1.0, -4.0], dtype=np.float32)
    assert document_scores(tokens, np.zeros(5, np.float32), [Span(0, 5)]) == [0.0]


def test_one_token_and_constant_documents_keep_their_tokens() -> None:
    tokens = np.array([0.25, 0.5, 0.5], dtype=np.float32)
    spans = [Span(0, 1), Span(1, 3)]
    assert document_scores(tokens, np.zeros(3, np.float32), spans).tolist() == [0.25, 1.0]


def test_baseline_may_be_shorter_than_the_prompt() -> None:
    query = np.arange(6, dtype=np.float32)
    assert document_scores(query, np.zeros(3, np.float32), [Span(1, 3)]) == [3.0]


def test_an_order_favours_the_earlier_of_equals() -> None:
    assert rank_prior(3, 2.0) == pytest.approx([0, -2 * np.log(2), -2 * np.log(3)])
    assert rank_prior(2, 0.0).tolist() == [0, 0]
    assert rank_prior(0, 2.0).tolist() == []


def test_a_first_stages_scores_count_by_their_distance_whatever_their_unit() -> None:
    prior = score_prior([3.0, 1.0, 2.0], 2.0)
    assert prior == pytest.approx([2 * 1.5**0.5, -2 * 1.5**0.5, 0])
    assert score_prior([300.0, 100.0, 200.0], 2.0) == pytest.approx(prior)
    assert score_prior([1000.3, 1000.1, 1000.2], 2.0) == pytest.approx(prior), "a constant shift"
    assert score_prior([3e307, 1e307, 2e307], 2.0) == pytest.approx(prior), "no overflow"
    rounded = [0.3, 0.1 + 0.2, 0.3]
    for equal in ([], [0.7], [0.7, 0.7], [0.1, 0.1, 0.1], [0.0, -5e-324], rounded, [1e308] * 3):
        assert score_prior(equal, 2.0).tolist() == [0.0] * len(equal)


def test_best_places_keep_the_order_of_equals() -> None:
    assert best_indices(np.array([1.0, 3.0, 2.0, 3.0]), 3) == [1, 3, 2]
    assert best_indices(np.array([1.0]), 5) == [0]
