"""Lists in which nothing is relevant."""

from __future__ import annotations

import numpy as np
import pytest
from support.head_sets import CALIBRATED
from langchain_core.documents import Document

from core_rerank_integrations import CoReDocumentCompressor, CoReReranker, HeadSet
from core_rerank_integrations.errors import HeadSetError, InvalidInputError
from core_rerank_integrations.models.resolve import LocalModel

QUERY = "Who patented the telephone?"
DOCUMENTS = [
    "Bread is baked from flour, water and salt.",
    "Alexander Graham Bell patented the telephone in 1876.",
    "Thomas Edison patented the phonograph in 1878.",
]


def test_nothing_comes_back_where_nothing_answers(
    smollm2: LocalModel, calibrated: CoReReranker
) -> None:
    def with_abstention(intercept: float) -> CoReReranker:
        rule = {
            "mean": -1, "candidates": 2, "slope": 1, "size_slope": 0, "intercept": intercept,
            "threshold": 0.5,
        }  # fmt: skip
        heads = CALIBRATED.with_scoring(abstention=rule)
        return CoReReranker(smollm2.path, heads=heads, reader=calibrated.reader)

    everything = with_abstention(0).rerank(QUERY, DOCUMENTS)
    said = with_abstention(0).answerable(everything)
    assert with_abstention(0).answerable(everything[::-1]) == pytest.approx(said)
    odds = np.array([np.log(r.relevance_score / (1 - r.relevance_score)) for r in everything])
    distance = odds.max() - (odds.sum() - 2) / (len(odds) + 2)
    assert said == pytest.approx(1 / (1 + np.exp(-distance)))
    sure, doubting = with_abstention(-distance + 0.01), with_abstention(-distance - 0.01)
    assert sure.answerable(everything) > sure.abstention_threshold > doubting.answerable(everything)
    order = [result.index for result in everything]
    for top_n in (None, 1):
        kept = sure.rerank(QUERY, DOCUMENTS, top_n, score_threshold="auto")
        assert [result.index for result in kept] == order[:top_n]
    assert doubting.rerank(QUERY, DOCUMENTS, score_threshold="auto") == []
    assert doubting.answerable([]) == 0
    assert doubting.rerank_batch([(QUERY, DOCUMENTS)], score_threshold="auto") == [[]]
    hurried = doubting.rerank(QUERY, DOCUMENTS, score_threshold="auto", max_seconds=1e-9)
    assert [result.index for result in hurried] == list(range(1, len(DOCUMENTS))), (
        "those that nobody has read"
    )
    compressor = CoReDocumentCompressor(reranker=doubting, score_threshold="auto")
    assert compressor.compress_documents([Document(text) for text in DOCUMENTS], QUERY) == []


def test_heads_that_do_not_know_when_nothing_answers(calibrated: CoReReranker) -> None:
    for call in (
        lambda: calibrated.rerank(QUERY, DOCUMENTS, score_threshold="auto"),
        lambda: calibrated.answerable([]),
    ):
        with pytest.raises(InvalidInputError, match="fit it with `core-rerank heads abstention`"):
            call()
    with pytest.raises(HeadSetError, match="an abstention is of calibrated probabilities"):
        HeadSet.from_pairs(
            [(1, 1)],
            scoring={
                "window": 1,
                "abstention": {
                    "mean": 0, "candidates": 1, "slope": 1, "size_slope": 0, "intercept": 0,
                    "threshold": 0.5,
                },
            },
        )  # fmt: skip
