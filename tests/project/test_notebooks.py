"""Run every notebook and compare its outputs with the stored ones.

`make notebooks` runs them and stores the outputs.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="notebooks need the extra 'test'")
nbclient = pytest.importorskip("nbclient", reason="notebooks need the extra 'test'")
pytest.importorskip("bm25s", reason="notebooks need the extra 'examples'")

pytestmark = [pytest.mark.examples, pytest.mark.timeout(900)]

FOLDER = Path(__file__).parents[2] / "examples/notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NUMBER = re.compile(r"-?\d+\.\d+")
TOLERANCE = 0.02
"""Tolerance of printed numbers, because processors compute in different precisions."""


def cleaned(notebook: Any) -> Any:
    """Remove what differs between runs and between machines."""
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [_reduced(output) for output in cell.outputs if _is_stored(output)]
    return notebook


def _is_stored(output: Any) -> bool:
    """Return whether to store an output; progress bars and warnings are on standard error."""
    return output.output_type != "stream" or output.name == "stdout"


def _reduced(output: Any) -> Any:
    if "text/html" in output.get("data", {}):
        output.data = {"text/html": output.data["text/html"]}
    return output


def texts_of(cell: Any) -> tuple[str, str]:
    """Return what a cell printed, and its HTML."""
    printed = [output.text for output in cell.outputs if output.output_type == "stream"]
    displayed = [output.data for output in cell.outputs if "data" in output]
    plain = [data["text/plain"] for data in displayed if "text/html" not in data]
    html = [data["text/html"] for data in displayed if "text/html" in data]
    return "".join([*printed, *plain]), "".join(html)


def assert_alike(text: str, expected: str) -> None:
    assert NUMBER.sub("0.0", text) == NUMBER.sub("0.0", expected)
    numbers, stored = (list(map(float, NUMBER.findall(each))) for each in (text, expected))
    assert numbers == pytest.approx(stored, abs=TOLERANCE)


def words(html: str) -> str:
    return re.sub(r"<[^>]+>", "", html)


def test_there_are_two_notebooks() -> None:
    assert [path.name for path in NOTEBOOKS] == ["langchain.ipynb", "own_data.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_says_what_is_stored(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    stored = [texts_of(cell) for cell in notebook.cells if cell.cell_type == "code"]
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", coalesce_streams=True
    )
    client.execute(cwd=str(FOLDER))
    if os.environ.get("WRITE_NOTEBOOKS"):
        nbformat.write(cleaned(notebook), path)
        return
    executed = [cell for cell in cleaned(notebook).cells if cell.cell_type == "code"]
    for cell, (text, html) in zip(executed, stored, strict=True):
        new_text, new_html = texts_of(cell)
        assert_alike(new_text, text)
        assert_alike(words(new_html), words(html))
        assert ("<span" in new_html) == ("<span" in html)  # The shades may differ.
    assert any(text for text, _ in stored), "stored without outputs"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_path_or_warning_of_a_machine_is_stored(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for part in (sys.prefix, str(Path.home()), str(FOLDER.parents[1]), "Warning", "stderr"):
        assert part not in text
