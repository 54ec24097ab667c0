"""Folders that are made once. Processes import this file, so it imports little."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from core_rerank_integrations.models.build_once import build_once


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.suffix != ".lock"]


def test_an_interrupted_fetch_is_cleared_away_by_the_next(cache: Path) -> None:
    partial = cache / ".made.partial"
    partial.mkdir(parents=True)
    (partial / "half").write_text("written by a process that was killed")

    def interrupted(_: Path, target: Path) -> None:
        target.mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(cache / "made", interrupted)
    assert leftovers(cache) == []

    def complete(work: Path, target: Path) -> None:
        assert list(work.iterdir()) == []
        target.mkdir()

    assert build_once(cache / "made", complete) == cache / "made"
    assert leftovers(cache) == ["made"]


def _slowly(work: Path, target: Path) -> None:
    time.sleep(0.3)
    target.mkdir()
    (target / "config.json").write_text("{}")
    with (work.parent / "count").open("a") as log:
        log.write("made\n")


def _make(folder: Path) -> None:
    build_once(folder, _slowly)


@pytest.mark.model
def test_several_processes_make_a_folder_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_make, args=(tmp_path / "made",)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "made" / "config.json").read_text() == "{}"
    assert (tmp_path / "count").read_text() == "made\n"
