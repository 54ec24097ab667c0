"""Every example runs as a user runs it, with the embedded models."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("bm25s", reason="examples need the extra of that name")

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str, typed: str = "") -> str:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        input=typed,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_examples_stay_short() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert len(lengths) == 4
    assert max(lengths.values()) < 100, lengths


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


def test_chatbot_takes_several_turns_and_names_sources() -> None:
    output = run("rag_chatbot.py", typed="When is the last ferry in winter?\nand in summer?\n")
    assert output.count("bot> ") == 2
    first, second = output.split("bot> ")[1:]
    assert "Winter sailings" in first
    for turn in (first, second):
        assert len(re.findall(r"^     -?\d+\.\d{3}  ", turn, re.MULTILINE)) == 3
