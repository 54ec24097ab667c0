from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.cli import failed, run

from core_rerank_integrations import __version__

pytestmark = pytest.mark.commands

QUERY = "Who patented the telephone?"
BREAD, BELL = "Bread is baked from flour.", "Bell patented the telephone in 1876."


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


@pytest.mark.model
def test_every_input_form(documents: Path) -> None:
    output = run("rerank", "--query", QUERY, "--documents", str(documents), "--output", "json")
    rows = json.loads(output)
    assert [row["index"] for row in rows] == [1, 0]
    assert [row["document"] for row in rows] == [BELL, BREAD]
    assert rows[0]["score"] > rows[1]["score"]
    assert rows[0]["probability"] > rows[1]["probability"]
    assert rows[0]["id"] in {"bell", "2"}


@pytest.mark.model
def test_cache_reports_what_it_wrote_and_writes_it_once(tmp_path: Path) -> None:
    arguments = ("cache", "--documents", "-", "--folder", str(tmp_path / "cached"))
    once = run(*arguments, typed=f"{BREAD}\n{BELL}\n")
    assert "2 documents are cached" in once
    assert str(tmp_path / "cached") in once
    assert "; 0 bytes written" in run(*arguments, typed=f"{BELL}\n")
    message = failed(*arguments, "--heads", "core-smollm2-135m-instruct", typed=BELL)
    assert "pass documents_per_prompt=1" in message


@pytest.mark.model
def test_text_and_trec_from_standard_input() -> None:
    arguments = ("rerank", "--query", QUERY, "--documents", "-", "--top-n", "1")
    assert BELL in run(*arguments, typed=f"{BREAD}\n{BELL}\n")
    trec = run(*arguments, "--output", "trec", "--query-id", "q7", typed=f"{BREAD}\n{BELL}\n")
    query, zero, document, rank, score, tag = trec.split()
    assert (query, zero, document, rank, tag) == ("q7", "Q0", "2", "1", "core-rerank")
    assert float(score) > 0


@pytest.mark.model
def test_options_of_a_call_are_passed_on() -> None:
    arguments = ("rerank", "--query", QUERY, "--documents", "-")
    typed = f"{BREAD}\n{BELL}\n"

    def rows(*options: str) -> list[dict[str, Any]]:
        return json.loads(run(*arguments, "--output", "json", *options, typed=typed))

    plain = rows()
    by_order = rows("--first-stage", "bm25")
    assert [row["probability"] for row in by_order] == [row["probability"] for row in plain]
    scores, shifted = ({row["id"]: row["score"] for row in found} for found in (plain, by_order))
    assert shifted["1"] - scores["1"] > shifted["2"] - scores["2"], "the first counts as better"
    between = str(sum(row["probability"] for row in plain) / 2)
    assert [row["id"] for row in rows("--score-threshold", between)] == ["2"]
    assert [row["id"] for row in rows("--score-threshold", "auto")] == ["2", "1"]
    between = str(sum(row["score"] for row in plain) / 2)
    assert [row["id"] for row in rows("--min-score", between)] == ["2"]
    first, late = rows("--max-seconds", "1e-9")
    assert first["score"] == scores["1"], "the first document is always read"
    assert (late["index"], late["score"], late["probability"]) == (1, None, None)
    assert "not read" in run(*arguments, "--max-seconds", "1e-9", typed=typed)
    listwise = ("--heads", "core-smollm2-135m-instruct")
    alone = rows(*listwise, "--documents-per-prompt", "1")
    assert alone != rows(*listwise)
    assert alone[0]["probability"] is None
    assert "not calibrated" in failed(*arguments, *listwise, "--score-threshold", "0.5", typed="a")
    assert "top_n: Input should be greater than" in failed(*arguments, "--top-n", "0", typed="a")


@pytest.mark.model
def test_text_shows_whether_the_list_is_answerable() -> None:
    arguments = ("rerank", "--query", QUERY, "--documents", "-")
    assert "a relevant document is in the list: 0." in run(*arguments, typed=f"{BREAD}\n{BELL}\n")


@pytest.mark.model
def test_evidence_of_each_document() -> None:
    two = f"{BREAD} {BELL}"
    arguments = ("rerank", "--query", QUERY, "--documents", "-", "--evidence")
    (row,) = json.loads(run(*arguments, "--output", "json", typed=f"{two}\n"))
    best = row["evidence"][0]
    assert two[best["start"] : best["stop"]] == BELL
    assert BELL in " ".join(run(*arguments, typed=f"{two}\n").split())


def test_errors_keep_their_text(tmp_path: Path) -> None:
    folder = tmp_path / "[chat] [/INST]"
    folder.mkdir(parents=True)
    arguments = ("rerank", "--query", QUERY, "--documents", "-", "--model", str(folder))
    assert f"error: {folder} is not a model folder" in failed(*arguments, typed="a\n")


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_a_missing_extra_is_named(missing: str) -> None:
    code = (
        f"import sys; sys.modules['{missing}'] = None; "
        "from core_rerank_integrations.cli import app; app()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: '{missing}")
    assert 'Install it with: pip install "core-rerank-integrations[cli]"' in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.model
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
    for command in ((), ("rerank",)):
        assert run("--version", *command).strip() == __version__


@pytest.mark.model
def test_fetch_prints_the_folder() -> None:
    folder = Path(run("models", "fetch", "smollm2-135m").strip())
    assert (folder / "config.json").is_file()


@pytest.mark.model
def test_demo() -> None:
    pytest.importorskip("bm25s", reason="the demo needs the extra 'examples'")
    output = run("demo", "--questions", "2", "--candidates", "5")
    for part in ("LangChain, BM25", "LlamaIndex, MiniLM", "before", "after", "nDCG@10", "MRR"):
        assert part in output
    assert "✔" in output
    assert output.count("reranking") >= 2
