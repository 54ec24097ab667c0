"""Every notebook runs, and says what the outputs say that it is kept with.

`make notebooks` runs them and keeps what they say from then on.
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
"""Of printed numbers: processors differ in the precision that they compute in."""


def cleaned(notebook: Any) -> Any:
    """Without what differs from run to run and from machine to machine."""
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [_kept(output) for output in cell.outputs if _is_kept(output)]
    return notebook


def _is_kept(output: Any) -> bool:
    """Progress bars and the warnings of libraries go to standard error."""
    return output.output_type != "stream" or output.name == "stdout"


def _kept(output: Any) -> Any:
    if "text/html" in output.get("data", {}):
        output.data = {"text/html": output.data["text/html"]}
    return output


def said(cell: Any) -> tuple[str, str]:
    """What a cell printed, and what it shows as HTML."""
    printed = [output.text for output in cell.outputs if output.output_type == "stream"]
    shown = [output.data for output in cell.outputs if "data" in output]
    plain = [data["text/plain"] for data in shown if "text/html" not in data]
    html = [data["text/html"] for data in shown if "text/html" in data]
    return "".join([*printed, *plain]), "".join(html)


def assert_alike(text: str, expected: str) -> None:
    assert NUMBER.sub("0.0", text) == NUMBER.sub("0.0", expected)
    numbers, kept = (list(map(float, NUMBER.findall(each))) for each in (text, expected))
    assert numbers == pytest.approx(kept, abs=TOLERANCE)


def words(html: str) -> str:
    return re.sub(r"<[^>]+>", "", html)


def test_there_are_two() -> None:
    assert [path.name for path in NOTEBOOKS] == ["langchain.ipynb", "own_data.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_says_what_it_is_kept_with(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    kept = [said(cell) for cell in notebook.cells if cell.cell_type == "code"]
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", coalesce_streams=True
    )
    client.execute(cwd=str(FOLDER))
    if os.environ.get("WRITE_NOTEBOOKS"):
        nbformat.write(cleaned(notebook), path)
        return
    executed = [cell for cell in cleaned(notebook).cells if cell.cell_type == "code"]
    for cell, (text, html) in zip(executed, kept, strict=True):
        new_text, new_html = said(cell)
        assert_alike(new_text, text)
        assert_alike(words(new_html), words(html))
        assert ("<span" in new_html) == ("<span" in html)  # Words are shaded, whatever the shade.
    assert any(text for text, _ in kept), "kept without outputs"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_of_a_machine_is_kept(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for of_machine in (sys.prefix, str(Path.home()), str(FOLDER.parents[1]), "Warning", "stderr"):
        assert of_machine not in text
