"""The ranking of the default heads, which does not depend on positions."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core_rerank_integrations import CoReReranker
from core_rerank_integrations.heads.shipped import default_head_set, named_head_set
from core_rerank_integrations.models.local_model import LocalModel

EVERYDAY = Path(__file__).parent / "data" / "everyday.jsonl"


@pytest.fixture(scope="module")
def default(smollm2: LocalModel) -> Iterator[CoReReranker]:
    with CoReReranker(smollm2.path, heads=default_head_set(smollm2.model_id)) as reranker:
        yield reranker


def everyday() -> list[dict[str, Any]]:
    return [json.loads(line) for line in EVERYDAY.read_text(encoding="utf-8").splitlines()]


def test_everyday_questions_find_their_sentence_wherever_it_stands(default: CoReReranker) -> None:
    found = dict.fromkeys(range(5), 0)
    for item in everyday():
        requests = [
            (item["question"], [*item["wrong"][:index], item["right"], *item["wrong"][index:]])
            for index in found
        ]
        for index, results in enumerate(default.rerank_batch(requests)):
            found[index] += results[0].index == index
    assert len(everyday()) == 50
    assert min(found.values()) >= 0.95 * 50, found


def test_the_small_heads_run_half_of_the_layers(smollm2: LocalModel) -> None:
    heads = named_head_set("small-smollm2-135m-instruct")
    assert (heads.highest_layer + 1, heads.adapter and heads.adapter.layers) == (10, 10)
    found = 0
    with CoReReranker(smollm2.path, heads=heads) as reranker:
        for item in everyday():
            documents = [*item["wrong"], item["right"]]
            found += reranker.rerank(item["question"], documents)[0].document == item["right"]
    assert found >= 0.85 * len(everyday())


def test_shuffling_changes_nothing(default: CoReReranker) -> None:
    draw = random.Random(0)
    documents = [text for item in everyday()[:4] for text in (item["right"], *item["wrong"])]
    query = everyday()[0]["question"]
    first = default.rerank(query, documents)
    for _ in range(3):
        shuffled = draw.sample(documents, len(documents))
        again = default.rerank(query, shuffled)
        assert [result.document for result in again] == [result.document for result in first]
        assert [result.probability for result in again] == pytest.approx(
            [result.probability for result in first], abs=1e-4
        )
    (alone,) = default.rerank(query, first[0].document.splitlines())
    assert alone.probability == pytest.approx(first[0].probability, abs=1e-4)
