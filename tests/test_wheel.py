"""The built wheel, alone in a clean environment with one framework beside the backend."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[1]

LANGCHAIN = """
from core_rerank_integrations import CoReDocumentCompressor
from langchain_core.documents import Document
documents = [Document("Bread is baked."), Document("Bell patented the telephone.")]
ranked = CoReDocumentCompressor().compress_documents(documents, "Who patented the telephone?")
assert ranked[0].page_content.startswith("Bell"), ranked
"""
LLAMA_INDEX = """
from core_rerank_integrations import CoReNodePostprocessor
from llama_index.core.schema import NodeWithScore, TextNode
texts = ["Bread is baked.", "Bell patented the telephone."]
nodes = [NodeWithScore(node=TextNode(text=text)) for text in texts]
ranked = CoReNodePostprocessor().postprocess_nodes(nodes, query_str="Who patented the telephone?")
assert ranked[0].text.startswith("Bell"), ranked
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    (path,) = folder.glob("*.whl")
    return path


def test_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    package = "core_rerank_integrations"
    for name in ("py.typed", "model_configs/core-phi-4.json", "examples/data/corpus.jsonl"):
        assert f"{package}/{name}" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {package}


@pytest.mark.parametrize(
    ("extra", "other", "code"),
    [("langchain", "llama_index", LANGCHAIN), ("llama-index", "langchain_core", LLAMA_INDEX)],
)
def test_one_framework(extra: str, other: str, code: str, wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    requirement = f"core-rerank-integrations[transformers,{extra}] @ {wheel.as_uri()}"
    # The constraints keep pip from a CUDA build of torch.
    subprocess.run(
        [python, "-m", "pip", "install", "-c", str(ROOT / "constraints.txt"), requirement],
        check=True,
    )
    subprocess.run([python, "-c", code], check=True, cwd=tmp_path)
    absent = f"import importlib.util; assert importlib.util.find_spec({other!r}) is None"
    subprocess.run([python, "-c", absent], check=True, cwd=tmp_path)
