"""The same scores as the method's authors, and as a plain computation of ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support import reference

from core_rerank_integrations import CoReReranker
from core_rerank_integrations.models.local_model import LocalModel

TOLERANCE = 1e-5


def tokens_of(
    reranker: CoReReranker, query: str, documents: list[str]
) -> tuple[list[list[int]], list[int]]:
    """First and last token of each document and of the query span."""
    encoder = reranker.scorer.encoder
    (prefix,) = encoder.prefixes([documents])
    last = len(prefix.ids) + len(encoder.question(query).ids) - 1
    spans = [[span.start, span.stop - 1] for span in prefix.document_spans]
    return spans, [prefix.context_length, last]


@pytest.mark.shared
@pytest.mark.parametrize("choice", ["core4", "icr_all"])
@pytest.mark.parametrize("backend", ["transformers", "openvino"])
def test_authors_scores(
    choice: str, backend: str, shared: Callable[[str], Any], smollm2: LocalModel
) -> None:
    goldens = shared("goldens/rerank_smollm2.json")
    heads = goldens["heads"][choice] or [(layer, head) for layer in range(30) for head in range(9)]
    with CoReReranker(
        smollm2.path,
        heads=[tuple(head) for head in heads],
        template="chatml",
        backend=backend,
        dtype="float32",
    ) as reranker:
        for case in goldens["cases"]:
            expected = case["expected"][choice]
            scores = reranker.score(case["query"], case["documents"])
            np.testing.assert_allclose(
                scores, expected["scores"], rtol=0, atol=TOLERANCE, err_msg=case["name"]
            )
            results = reranker.rerank(case["query"], case["documents"])
            assert [result.index for result in results] == expected["ranking"], case["name"]

            spans, query_span = tokens_of(reranker, case["query"], case["documents"])
            assert spans == expected["doc_spans"], case["name"]
            assert query_span == expected["query_span"], case["name"]


def test_own_golden(reranker: CoReReranker) -> None:
    golden = json.loads(reference.GOLDEN.read_text(encoding="utf-8"))
    scores = reranker.score(golden["query"], golden["documents"])
    np.testing.assert_allclose(scores, golden["scores"], rtol=0, atol=TOLERANCE)
    spans, query_span = tokens_of(reranker, golden["query"], golden["documents"])
    assert spans == golden["document_spans"]
    assert query_span == golden["query_span"]


def test_plain_computation(reranker: CoReReranker, smollm2: LocalModel) -> None:
    """Fresh texts, through the uncached, uncut, eager computation."""
    model, tokenizer = reference.load(smollm2.path)
    documents = ["Tin melts at 232 degrees.", "A tin of soup, opened.", "Lead melts at 327."]
    query = "melting point of tin"
    expected = reference.rerank(model, tokenizer, query, documents, reference.HEADS)
    np.testing.assert_allclose(
        reranker.score(query, documents), expected["scores"], rtol=0, atol=TOLERANCE
    )
