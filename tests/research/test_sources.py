from __future__ import annotations

from pathlib import Path

import pytest

from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.research.sources import JudgedRun


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data:test:run", JudgedRun(Path("data"), "test", Path("run"))),
        ("data:test:run:20:dense", JudgedRun(Path("data"), "test", Path("run"), 20, "dense")),
        ("data:test:run:unordered", JudgedRun(Path("data"), "test", Path("run"), None, None)),
        (
            r"C:\my data:test:D:/runs/a.trec:5",
            JudgedRun(Path(r"C:\my data"), "test", Path("D:/runs/a.trec"), 5),
        ),
    ],
)
def test_sources_are_parsed(text: str, expected: JudgedRun) -> None:
    assert JudgedRun.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "data", "data:test", "data:test:run:0", "a:b:c:5:bm26", ":::"]
)
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match="expected FOLDER:SPLIT:RUN"):
        JudgedRun.parse(text)
