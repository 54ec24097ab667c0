from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_rerank_integrations.errors import DocumentTruncatedWarning
from core_rerank_integrations.backends.loading import load_encoder
from core_rerank_integrations.models.resolve import LocalModel
from core_rerank_integrations.method.windows import Layout, WindowPlanner, plan_windows


def test_one_window_when_all_fits() -> None:
    assert plan_windows([10, 20, 30], budget=60) == [[0, 1, 2]]


def test_candidates_are_interleaved_over_equal_windows() -> None:
    assert plan_windows([10] * 7, budget=1000, size=3) == [[0, 3, 6], [1, 4], [2, 5]]
    assert plan_windows([10] * 8, budget=40) == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_one_long_document_does_not_split_the_others() -> None:
    windows = plan_windows([10] * 9 + [95], budget=100)
    assert windows == [[9], [0, 1, 2, 3, 4, 5, 6, 7, 8]]


def test_no_documents() -> None:
    assert plan_windows([], budget=10) == []


def test_alone_a_document_is_cut_or_read_by_passages(smollm2: LocalModel) -> None:
    planner = WindowPlanner(load_encoder(smollm2, "chatml"), max_context=120)
    long = "word " * 300
    pieces = planner.windows("q", [long], Layout(1))
    assert len(pieces) > 3
    assert {index for piece in pieces for index in piece.indices} == {0}
    assert max(len(piece.prompt) for piece in pieces) <= 120
    # Features are of documents: cut to the context, such a one stays one piece.
    with pytest.warns(DocumentTruncatedWarning, match="document 0 was cut"):
        (piece,) = planner.windows("q", [long], Layout(1, max_document_tokens=120))
    assert len(piece.prompt) <= 120


def test_each_by_itself() -> None:
    assert plan_windows([10, 90, 20], budget=90, size=1) == [[0], [1], [2]]


@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=60),
    st.integers(100, 400),
    st.none() | st.integers(1, 20),
)
def test_every_document_once_within_budget_and_size(
    lengths: list[int], budget: int, size: int | None
) -> None:
    windows = plan_windows(lengths, budget, size)
    assert sorted(index for window in windows for index in window) == list(range(len(lengths)))
    for window in windows:
        assert window == sorted(window)
        assert sum(lengths[index] for index in window) <= budget
        assert len(window) <= (size or len(lengths))
