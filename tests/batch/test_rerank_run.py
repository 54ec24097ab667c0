"""Runs over a collection in one process; tests/batch/test_ray_data.py does the same on Ray."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.cli import failed, run
from support.head_sets import HEADS

from core_rerank_integrations import CoReReranker, RerankOptions
from core_rerank_integrations.batch import RunOptions, rerank_run
from core_rerank_integrations.batch.journal import Journal
from core_rerank_integrations.batch.lists import ListReranker, Row
from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.settings import RerankerSettings

CORPUS = {
    "d1": "Bread is made of flour.",
    "d2": "Bell patented the telephone.",
    "d3": "Canberra is the capital of Australia.",
}
QUERIES = {"q1": "Who patented the telephone?", "q2": "What is bread made of?", "q3": "Capital?"}
FLOAT32 = RerankerSettings(dtype="float32")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for file, texts in (("corpus", CORPUS), ("queries", QUERIES)):
        lines = [f'{{"_id": "{name}", "text": "{text}"}}\n' for name, text in texts.items()]
        (tmp_path / f"{file}.jsonl").write_text("".join(lines))
    (tmp_path / "in.trec").write_text(
        "".join(
            f"{query} Q0 {document} {rank} {-rank} bm25\n"
            for query in QUERIES
            for rank, document in enumerate(CORPUS, start=1)
        )
    )
    return tmp_path


def options(folder: Path, **changes: Any) -> RunOptions:
    given = {"run": folder / "in.trec", "corpus": folder, "output": folder / "out.trec"}
    return RunOptions(**(given | {"lists_per_batch": 1} | changes))


def rankings(path: Path) -> dict[str, list[tuple[str, float]]]:
    found: dict[str, list[tuple[str, float]]] = {}
    for line in path.read_text().splitlines():
        query, _, document, rank, score, tag = line.split()
        found.setdefault(query, []).append((document, float(score)))
        assert int(rank) == len(found[query])
        assert tag == "core-rerank"
    return found


@pytest.mark.commands
@pytest.mark.model
def test_the_command_ranks_as_the_library(folder: Path) -> None:
    output = folder / "runs/out.trec"
    printed = run(
        *("rerank-run", "--run", str(folder / "in.trec"), "--corpus", str(folder / "corpus.jsonl")),
        *("--queries", str(folder / "queries.jsonl"), "--candidates", "2", "--dtype", "float32"),
        *("--output", str(output)),
    )
    assert str(output) in printed
    assert [path.name for path in output.parent.iterdir()] == ["out.trec"]
    texts = list(CORPUS.values())[:2]
    with CoReReranker(dtype="float32") as reranker:
        expected = {query: reranker.score(text, texts) for query, text in QUERIES.items()}
    found = rankings(output)
    assert list(found) == list(QUERIES)
    for query, scores in expected.items():
        assert dict(found[query]) == pytest.approx(
            dict(zip(CORPUS, scores, strict=False)), abs=1e-4
        )


class Died(BaseException):
    """The process was killed."""


@pytest.mark.commands
@pytest.mark.model
def test_an_interrupted_run_continues(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = options(folder, output=folder / "whole.trec")
    rerank_run(whole, FLOAT32)
    rerank = ListReranker.__call__
    read: list[str] = []

    def die_at_the_second(self: ListReranker, rows: Any) -> Any:
        if len(read) == 1:
            raise Died
        read.extend(row["query"] for row in rows)
        return rerank(self, rows)

    monkeypatch.setattr(ListReranker, "__call__", die_at_the_second)
    interrupted = options(folder)
    with pytest.raises(Died):
        rerank_run(interrupted, FLOAT32)
    assert not interrupted.output.exists()
    journal = folder / "out.trec.unfinished"
    with journal.open("ab") as file:
        file.write(b'{"candidates": "torn')
    with pytest.raises(InvalidInputError, match="other settings"):
        rerank_run(interrupted, FLOAT32, RerankOptions(top_n=1))
    monkeypatch.setattr(ListReranker, "__call__", rerank)
    queries = (folder / "queries.jsonl").read_text()
    (folder / "queries.jsonl").write_text(queries.replace("Capital?", "A capital?"))
    rerank_run(interrupted, FLOAT32)
    found, expected = rankings(interrupted.output), rankings(whole.output)
    assert found["q1"] == expected["q1"]
    assert dict(found["q2"]) == pytest.approx(dict(expected["q2"]), abs=1e-4)
    assert found["q3"] != expected["q3"]
    assert not journal.exists()
    with pytest.raises(InvalidInputError, match=r"out\.trec exists"):
        rerank_run(interrupted, FLOAT32)


@pytest.mark.model
def test_a_long_query_is_named_and_a_higher_limit_continues(folder: Path) -> None:
    queries = (folder / "queries.jsonl").read_text()
    (folder / "queries.jsonl").write_text(queries.replace("Capital?", "Capital? " * 30))
    limited = FLOAT32.model_copy(update={"max_query_tokens": 20})
    with pytest.raises(InvalidInputError, match=r"^query 'q3': the query takes \d+ tokens"):
        rerank_run(options(folder), limited)
    finished = (folder / "out.trec.unfinished").read_text().splitlines()[1:]
    assert not finished, "queries are checked before the first is ranked"
    rerank_run(options(folder), FLOAT32)
    assert list(rankings(folder / "out.trec")) == list(QUERIES)


class Unread(ListReranker):
    """Return documents as they come, without a model."""

    def __init__(self, *_: Any) -> None:
        pass

    def check(self, rows: Sequence[Row]) -> None:
        pass

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        return [
            row | {"results": [{"index": n, "score": -n} for n in range(len(row["documents"]))]}
            for row in rows
        ]

    def close(self) -> None:
        pass


def test_the_output_survives_a_power_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is on disk before the journal is deleted."""
    events: list[Any] = []
    sync, delete = os.fsync, Journal.delete

    def record(file: int) -> None:
        events.append(os.fstat(file).st_ino)
        sync(file)

    def record_deletion(journal: Journal) -> None:
        events.append("deleted")
        delete(journal)

    monkeypatch.setattr("core_rerank_integrations.batch.run.ListReranker", Unread)
    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(Journal, "delete", record_deletion)
    rerank_run(options(folder), FLOAT32)
    assert (folder / "out.trec").stat().st_ino in events[: events.index("deleted")]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("in.trec", "q1 Q0 d9 1 1.0 x", "line 1: the document 'd9' is not in the corpus"),
        ("in.trec", "q9 Q0 d1 1 1.0 x", "queries that are missing.*'q9'"),
        ("queries.jsonl", '{"_id": "q1", "text": " "}', "query 'q1': the query is empty"),
        ("corpus.jsonl", None, "cannot read .*corpus.jsonl"),
    ],
)
def test_what_is_missing_is_named_before_the_model_loads(
    file: str, content: str | None, message: str, folder: Path
) -> None:
    (folder / "in.trec").write_text("q1 Q0 d1 1 1.0 x")
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(InvalidInputError, match=message):
        rerank_run(options(folder), RerankerSettings(model="no-such-model"))
    assert not (folder / "out.trec.unfinished").exists()


def test_files_of_documents_need_queries_and_runs_hold_whole_rankings(folder: Path) -> None:
    alone = ("--run", str(folder / "in.trec"), "--corpus", str(folder / "corpus.jsonl"))
    output = ("--output", str(folder / "out.trec"))
    assert "give the file of queries" in failed("rerank-run", *alone, *output)
    assert "evidence and max_seconds" in failed("rerank-run", *alone, *output, "--evidence")


def test_only_finished_queries_bind_a_run_to_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    Journal(path, "a typing error").read()
    corrected = Journal(path, "right")
    assert corrected.read() == {}
    corrected.add({"query": [("document", 1.0)]})
    assert Journal(path, "right").read() == {"query": [("document", 1.0)]}
    with pytest.raises(InvalidInputError, match="finished with other settings: right"):
        Journal(path, "a typing error").read()


@pytest.mark.model
def test_a_run_does_not_continue_with_heads_that_have_changed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = folder / "heads.json"
    HEADS.save(heads)
    settings = RerankerSettings(heads=heads, dtype="float32")
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "delete", lambda _: None)  # As if the process died just before.
        rerank_run(options(folder), settings)
    options(folder).output.unlink()
    HEADS.with_scoring(documents_per_prompt=10).save(heads)
    with pytest.raises(InvalidInputError, match="other settings"):
        rerank_run(options(folder), settings)


def test_a_damaged_journal_is_an_error(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out.unfinished", "settings")
    assert journal.read() == {}
    journal.add({"key": [("d1", 0.1 + 0.2)]})
    assert journal.read() == {"key": [("d1", 0.1 + 0.2)]}
    journal.path.write_text("nonsense\n")
    with pytest.raises(InvalidInputError, match="damaged: delete it"):
        journal.read()
