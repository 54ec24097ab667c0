"""Lists without a relevant document."""

from __future__ import annotations

import numpy as np
import pytest
from langchain_core.documents import Document
from support.head_sets import CALIBRATED

from core_rerank_integrations import CoReDocumentCompressor, CoReReranker, HeadSet
from core_rerank_integrations.errors import HeadSetError, InvalidInputError
from core_rerank_integrations.models.local_model import LocalModel

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
        abstention = {
            "mean": -1, "candidates": 2, "slope": 1, "size_slope": 0, "intercept": intercept,
            "threshold": 0.5,
        }  # fmt: skip
        heads = CALIBRATED.with_scoring(abstention=abstention)
        return CoReReranker.from_scorer(calibrated.scorer, smollm2.path, heads)

    everything = with_abstention(0).rerank(QUERY, DOCUMENTS)
    answerability = everything.answerability
    assert answerability is not None
    assert with_abstention(0).rerank(QUERY, DOCUMENTS, top_n=1).answerability == pytest.approx(
        answerability
    ), "it is a property of the whole list"
    odds = np.array([np.log(r.relevance_score / (1 - r.relevance_score)) for r in everything])
    margin = odds.max() - (odds.sum() - 2) / (len(odds) + 2)
    assert answerability == pytest.approx(1 / (1 + np.exp(-margin)))
    sure, doubting = with_abstention(-margin + 0.01), with_abstention(-margin - 0.01)
    assert sure.rerank(QUERY, DOCUMENTS).answerability > sure.abstention_threshold
    assert doubting.rerank(QUERY, DOCUMENTS).answerability < doubting.abstention_threshold
    order = [result.index for result in everything]
    for top_n in (None, 1):
        kept = sure.rerank(QUERY, DOCUMENTS, top_n=top_n, score_threshold="auto")
        assert [result.index for result in kept] == order[:top_n]
    assert not doubting.rerank(QUERY, DOCUMENTS, score_threshold="auto")
    assert doubting.rerank(QUERY, []).answerability == 0
    (batch,) = doubting.rerank_batch([(QUERY, DOCUMENTS)], score_threshold="auto")
    assert len(batch) == 0
    hurried = doubting.rerank(QUERY, DOCUMENTS, score_threshold="auto", max_seconds=1e-9)
    assert [result.index for result in hurried] == list(range(1, len(DOCUMENTS))), (
        "the documents that were not read"
    )
    compressor = CoReDocumentCompressor(reranker=doubting, score_threshold="auto")
    assert compressor.compress_documents([Document(text) for text in DOCUMENTS], QUERY) == []


def test_heads_without_abstention(calibrated: CoReReranker) -> None:
    assert calibrated.rerank(QUERY, DOCUMENTS).answerability is None
    for call in (
        lambda: calibrated.rerank(QUERY, DOCUMENTS, score_threshold="auto"),
        lambda: calibrated.abstention_threshold,
    ):
        with pytest.raises(InvalidInputError, match="fit it with `core-rerank heads abstention`"):
            call()
    with pytest.raises(HeadSetError, match="abstention requires calibration"):
        HeadSet.from_pairs(
            [(1, 1)],
            scoring={
                "documents_per_prompt": 1,
                "abstention": {
                    "mean": 0, "candidates": 1, "slope": 1, "size_slope": 0, "intercept": 0,
                    "threshold": 0.5,
                },
            },
        )  # fmt: skip
