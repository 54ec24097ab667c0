from __future__ import annotations

import json
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

DOCUMENT = '{"_id": "d", "text": "t"}'
COLUMNS = "query-id\tcorpus-id\tscore"


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
        ("corpus.jsonl", '{"_id": "d"}', "corpus.jsonl, line 1: text: Field required"),
        ("corpus.jsonl", '{"text": "d"}', "line 1: _id: Field required"),
        ("corpus.jsonl", "[]", "line 1: Input should be"),
        ("corpus.jsonl", f"{DOCUMENT}\n\n{DOCUMENT}", "line 3 has the id 'd' of line 1"),
        ("corpus.jsonl", '{"_id": "d", "text": 5}', "line 1: text: .*string, got 5"),
        (
            "corpus.jsonl",
            '{"_id": "d", "text": "a", "title": []}',
            "line 1: title: .*string",
        ),
        ("corpus.jsonl", f"{DOCUMENT}\n{{", "line 2 is not JSON: Expecting property name"),
        ("corpus.jsonl", "[" * 100_000, "line 1 is not JSON: nested too deeply"),
        ("corpus.jsonl", f"{DOCUMENT}\n\udcff", "line 2: bytes that are not UTF-8"),
        ("queries.jsonl", "nonsense", "queries.jsonl, line 1 is not JSON"),
        ("queries.jsonl", '{"_id": "q", "answers": []}', "line 1: text: Field required"),
        ("queries.jsonl", '{"_id": "q", "text": "", "answers": "a"}', "line 1: answers: .*list"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq\te\t1\n", "document 'e', which is miss"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\np\td\t1\n", "query 'p', which is missing"),
        ("qrels/test.tsv", "q d 1\n", "tab-separated"),
        ("qrels/test.tsv", f"{COLUMNS}\nq\td\t1\nq\td", "line 3: expected tab-separated"),
        (
            "qrels/test.tsv",
            f"{COLUMNS}\n\nq\td\t0.5",
            "line 3: expected .*integer, got 'q.td.t0.5'",
        ),
        ("qrels/test.tsv", f"{COLUMNS}\nq\td\t1\0", "line 2: a NUL character"),
    ],
)
def test_malformed_files_are_named(folder: Path, file: str, content: str, message: str) -> None:
    (folder / file).write_text(content, errors="surrogateescape")
    with pytest.raises(InvalidInputError, match=message):
        Collection.load(folder)


def test_marks_line_ends_separators_and_null_are_read_as_they_are_meant(folder: Path) -> None:
    records = [
        {"_id": "d", "title": None, "text": "one\u2028two\x85three", "answers": None},
        {"_id": 7, "title": "Seven", "text": "t", "url": []},
    ]
    lines = "\r\n\r\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (folder / "corpus.jsonl").write_bytes(f"\ufeff{lines}".encode())
    (folder / "qrels/test.tsv").write_bytes(f"\ufeff{COLUMNS}\r\nq\t7\t1\r\n\r\n".encode())
    collection = Collection.load(folder)
    assert [passage.content for passage in collection.passages.values()] == [
        "one\u2028two\x85three",
        "Seven t",
    ]
    assert collection.qrels == {"q": {"7": 1}}
    (folder / "corpus.jsonl").write_bytes(lines.encode("utf-16"))
    assert Collection.load(folder).passages == collection.passages


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
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "t", "answers": [""]}')
    assert not Collection.load(folder).has_answer("q", "Edison"), "every text contains nothing"


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
        ("q Q0 d 1 nan x", "line 1: expected"),
        ("q Q0 d 1 1.0 x\n\nq Q0 d 2 0.5 x", "line 3: the query 'q' has the document 'd' twice"),
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
