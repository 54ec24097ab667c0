from __future__ import annotations

from math import log2
from pathlib import Path

import pytest

from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.evaluation import Collection, measure
from core_rerank_integrations.resources import resource_folder


def test_demo_collection_is_complete() -> None:
    collection = Collection.load(resource_folder("examples/data"))
    assert len(collection.passages) >= 60
    assert len(collection.queries) >= 25
    assert all(2 in grades.values() for grades in collection.qrels.values())


def test_measures() -> None:
    qrels = {"q": {"a": 2, "b": 1}, "r": {"c": 1}}
    measured = measure(qrels, {"q": ["x", "b", "a"], "r": ["c", "x"]})
    gain = 1 / log2(3) + 2 / log2(4)
    assert measured["nDCG@10"] == pytest.approx((gain / (2 + 1 / log2(3)) + 1) / 2)
    assert measured["MRR"] == pytest.approx((1 / 2 + 1) / 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d", "text": "t"}\n')
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "t"}\n{"_id": "u", "text": ""}')
    (tmp_path / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    return tmp_path


def test_unjudged_queries_are_left_out(folder: Path) -> None:
    assert list(Collection.load(folder).queries) == ["q"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("corpus.jsonl", '{"_id": "d"}', "line 1: needs '_id' and 'text'"),
        ("queries.jsonl", "nonsense", "cannot read"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq\te\t1\n", "document 'e', which is miss"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\np\td\t1\n", "query 'p', which is missing"),
        ("qrels/test.tsv", "q d 1\n", "tab-separated"),
    ],
)
def test_malformed_files_are_named(folder: Path, file: str, content: str, message: str) -> None:
    (folder / file).write_text(content)
    with pytest.raises(InvalidInputError, match=message):
        Collection.load(folder)
