from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, strategies as st

from core_rerank_integrations.errors import DocumentTruncatedWarning
from core_rerank_integrations.method.windows import (
    Candidates,
    Layout,
    Window,
    WindowPlanner,
    plan_windows,
)
from core_rerank_integrations.models.encoder import load_encoder
from core_rerank_integrations.models.local_model import LocalModel


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


def length(window: Window) -> int:
    return len(window.prefix.ids) + len(window.question)


def test_a_single_document_is_truncated_or_divided_into_passages(smollm2: LocalModel) -> None:
    planner = WindowPlanner(load_encoder(smollm2, "chatml"), max_context=120)
    candidates = Candidates("q", ("word " * 300,))
    for _ in ("new", "cached"):
        windows = planner.windows(candidates, Layout(1))
        assert len(windows) > 3
        assert {index for window in windows for index in window.indices} == {0}
        assert max(map(length, windows)) <= 120
    # Head features belong to a whole document, so it is truncated and stays one window.
    with pytest.warns(DocumentTruncatedWarning, match="document 0 was cut"):
        (window,) = planner.windows(candidates, Layout(1, max_document_tokens=120))
    assert length(window) <= 120


class CountingTokenizer:
    """A tokenizer that counts the texts it encodes."""

    def __init__(self, tokenizer: Any, texts: list[str]) -> None:
        self._tokenizer, self._texts = tokenizer, texts

    def encode(self, text: str, **options: Any) -> Any:
        self._texts.append(text)
        return self._tokenizer.encode(text, **options)

    def encode_batch(self, texts: list[str], **options: Any) -> Any:
        self._texts.extend(texts)
        return self._tokenizer.encode_batch(texts, **options)


def test_a_document_is_tokenised_once(smollm2: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_encoder(smollm2, "chatml")
    planner = WindowPlanner(encoder, max_context=2048)
    texts: list[str] = []
    for name in ("_tokenizer", "_plain"):
        monkeypatch.setattr(encoder, name, CountingTokenizer(getattr(encoder, name), texts))
    documents = tuple(f"Note number {number}." for number in range(5))
    layout = Layout(1, passage_tokens=100)
    for question, expected in (("first question", 5), ("second question", 0)):
        texts.clear()
        planner.windows(Candidates(question, documents), layout)
        assert sum("Note number" in text for text in texts) == expected
        assert sum(question in text for text in texts) == 1


def test_one_document_per_window() -> None:
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
