from __future__ import annotations

from pathlib import Path

import pytest

from core_rerank_integrations._internal.resources import resource_folder
from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.research.collection import (
    Collection,
    has_contrast,
    load_run,
    save_run,
)


def test_demo_collection_is_complete() -> None:
    collection = Collection.load(resource_folder("examples/data"))
    assert len(collection.passages) >= 60
    assert len(collection.queries) >= 25
    assert all(2 in grades.values() for grades in collection.qrels.values())


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
        ("corpus.jsonl", "[]", "line 1: needs '_id' and 'text'"),
        ("queries.jsonl", "nonsense", "cannot read"),
        ("queries.jsonl", '{"_id": "q", "answers": []}', "line 1: needs '_id' and 'text'"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq\te\t1\n", "document 'e', which is miss"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\np\td\t1\n", "query 'p', which is missing"),
        ("qrels/test.tsv", "q d 1\n", "tab-separated"),
    ],
)
def test_malformed_files_are_named(folder: Path, file: str, content: str, message: str) -> None:
    (folder / file).write_text(content)
    with pytest.raises(InvalidInputError, match=message):
        Collection.load(folder)


def test_a_partial_corpus_keeps_all_judgments(folder: Path) -> None:
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\nq\te\t2\n")
    with pytest.raises(InvalidInputError, match="'e', which is missing"):
        Collection.load(folder)
    assert Collection.load(folder, partial=True).qrels == {"q": {"d": 1, "e": 2}}


def test_answers_are_found_in_any_case(folder: Path) -> None:
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "t", "answers": ["BELL"]}\n')
    collection = Collection.load(folder)
    assert collection.answers == {"q": ["BELL"]}
    assert collection.has_answer("q", "Alexander Bell")
    assert not collection.has_answer("q", "Edison")
    assert not collection.has_answer("other", "BELL")


def test_contrast_needs_both_relevant_and_irrelevant_documents() -> None:
    assert has_contrast([0, 2, 1])
    assert has_contrast([-1, 1])
    assert not has_contrast([1, 2])
    assert not has_contrast([0, 0])
    assert not has_contrast([])


def test_runs_are_ordered_by_score_then_rank(folder: Path, tmp_path: Path) -> None:
    (folder / "corpus.jsonl").write_text(
        "".join(f'{{"_id": "{name}", "text": "t"}}\n' for name in "dabc")
    )
    collection = Collection.load(folder)
    path = tmp_path / "run.trec"
    path.write_text("q Q0 a 3 1.0 x\nq Q0 b 2 1.0 x\nq Q0 c 1 -2 x\nq Q0 d 4 7.5 x\n")
    assert load_run(path, collection) == {"q": ["d", "b", "a", "c"]}
    save_run(path, {"q": [("b", 0.5), ("a", 0.25)]}, "tag")
    assert path.read_text() == "q Q0 b 1 0.5 tag\nq Q0 a 2 0.25 tag\n"
    assert load_run(path, collection) == {"q": ["b", "a"]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q Q0 d 1 1.0", "line 1: expected 'query Q0 document rank score tag'"),
        ("q Q0 d first 1.0 x", "line 1: expected"),
        ("q Q0 e 1 1.0 x", "document 'e' is not in the corpus"),
        ("other Q0 d 1 1.0 x", "'other'; is it the run of another split?"),
        ("", "is empty"),
    ],
)
def test_bad_runs_are_named(folder: Path, tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "run.trec"
    path.write_text(line + "\n" if line else "")
    with pytest.raises(InvalidInputError, match=message):
        load_run(path, Collection.load(folder))
