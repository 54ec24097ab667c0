from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from core_rerank_integrations import __version__
from core_rerank_integrations.cli import app

QUERY = "Who patented the telephone?"
BREAD, BELL = "Bread is baked from flour.", "Bell patented the telephone in 1876."


def run(*arguments: str, typed: str | None = None) -> str:
    result = CliRunner().invoke(app, list(arguments), input=typed)
    assert result.exit_code == 0, result.output
    return result.stdout


def failed(*arguments: str, typed: str | None = None) -> str:
    result = CliRunner().invoke(app, list(arguments), input=typed)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


@pytest.fixture(params=["lines", "jsonl", "array", "strings"])
def documents(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    records = [{"_id": "bread", "text": BREAD}, {"id": "bell", "title": "Bell", "text": BELL[5:]}]
    text = {
        "lines": f"{BREAD}\n\n{BELL}\n",
        "jsonl": "\n".join(map(json.dumps, records)),
        "array": json.dumps(records),
        "strings": json.dumps([BREAD, BELL]),
    }[request.param]
    path = tmp_path / "documents"
    path.write_text(text)
    return path


def test_every_input_form(documents: Path) -> None:
    output = run("rerank", "--query", QUERY, "--documents", str(documents), "--output", "json")
    rows = json.loads(output)
    assert [row["index"] for row in rows] == [1, 0]
    assert [row["document"] for row in rows] == [BELL, BREAD]
    assert rows[0]["score"] > rows[1]["score"]
    assert rows[0]["id"] in {"bell", "2"}


def test_remember_says_what_it_wrote_and_writes_it_once(tmp_path: Path) -> None:
    arguments = ("remember", "--documents", "-", "--folder", str(tmp_path / "known"))
    once = run(*arguments, typed=f"{BREAD}\n{BELL}\n")
    assert "2 documents are known" in once
    assert str(tmp_path / "known") in once
    assert "; 0 bytes written" in run(*arguments, typed=f"{BELL}\n")
    message = failed(*arguments, "--heads", "core-smollm2-135m-instruct", typed=BELL)
    assert "pass window=1" in message


def test_text_and_trec_from_standard_input() -> None:
    arguments = ("rerank", "--query", QUERY, "--documents", "-", "--top-n", "1")
    assert BELL in run(*arguments, typed=f"{BREAD}\n{BELL}\n")
    trec = run(*arguments, "--output", "trec", "--query-id", "q7", typed=f"{BREAD}\n{BELL}\n")
    query, zero, document, rank, score, tag = trec.split()
    assert (query, zero, document, rank, tag) == ("q7", "Q0", "2", "1", "core-rerank")
    assert float(score) > 0


def test_evidence_of_each_document() -> None:
    two = f"{BREAD} {BELL}"
    arguments = ("rerank", "--query", QUERY, "--documents", "-", "--evidence")
    (row,) = json.loads(run(*arguments, "--output", "json", typed=f"{two}\n"))
    best = row["evidence"][0]
    assert two[best["start"] : best["stop"]] == BELL
    assert BELL in " ".join(run(*arguments, typed=f"{two}\n").split())


def test_errors_are_sentences(tmp_path: Path) -> None:
    rerank = ("rerank", "--query", QUERY, "--documents")
    assert "cannot read documents from /nowhere" in failed(*rerank, "/nowhere")
    assert "holds no documents" in failed(*rerank, "-", typed="\n")
    assert "document 2 of -" in failed(*rerank, "-", typed='[{"text": "a"}, {"body": "b"}]')
    assert "neither a head set file" in failed(*rerank, "-", "--heads", "no", typed="a\n")
    assert "the query is empty" in failed("rerank", "--query", " ", "--documents", "-", typed="a\n")
    folder = tmp_path / "empty"
    folder.mkdir()
    assert "holds no config.json" in failed(*rerank, "-", "--model", str(folder), typed="a\n")


def test_lists() -> None:
    assert "smollm2-135m" in run("models", "list")
    assert "core-phi-4" in run("heads", "list")
    assert run("--version").strip() == __version__


def test_fetch_prints_the_folder() -> None:
    folder = Path(run("models", "fetch", "smollm2-135m").strip())
    assert (folder / "config.json").is_file()


def test_demo() -> None:
    pytest.importorskip("bm25s", reason="the demo needs the extra 'examples'")
    output = run("demo", "--questions", "2", "--candidates", "5")
    for part in ("LangChain, BM25", "LlamaIndex, MiniLM", "before", "after", "nDCG@10", "MRR"):
        assert part in output
    assert "✔" in output
    assert output.count("reranking") >= 2
