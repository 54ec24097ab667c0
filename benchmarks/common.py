"""What the benchmarks share: the work, and how two things are timed against each other."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from itertools import cycle, islice
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from core_rerank_integrations import HeadSet
from core_rerank_integrations.research.collection import Collection
from core_rerank_integrations._internal.resources import resource_folder

MODEL = "smollm2-135m"
HEADS = HeadSet.from_pairs(
    [(18, 7), (17, 3), (14, 3), (17, 4)],
    name="four",
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    template="chatml",
    scoring={"window": 20},
)
"""Always the same, so that figures of different days stand side by side."""
WORDS = 78
"""Words of a document: about 110 tokens."""
NQ_WORDS = 11
"""Longest question, in words, where they are to be like Natural Questions', of nine on average."""
LONG_WORDS = 290
"""Words of a document of about 400 tokens."""


def machine(*packages: str) -> str:
    """Date, machine and versions: the line above every table."""
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return (
        f"{time.strftime('%Y-%m-%d')}, {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads, Python {platform.python_version()}, {versions}"
    )


def requests(
    count: int,
    documents: int,
    words: int = WORDS,
    label: str = "",
    longest_query: int | None = None,
) -> list[tuple[str, list[str]]]:
    """Queries of the demo, each with ``documents`` passages, none of them twice.

    A passage is a stretch of ``words`` words of the demo's handbook. ``label`` sets the lists of
    one call apart from those of another. ``longest_query`` leaves longer queries out, in words.
    """
    collection = Collection.load(resource_folder("examples/data"))
    stream = cycle(
        word for passage in collection.passages.values() for word in passage.text.split()
    )
    chosen = [
        query
        for query in collection.queries.values()
        if longest_query is None or len(query.split()) <= longest_query
    ]
    queries = islice(cycle(chosen), count)
    return [
        (
            f"{query} {label}",
            [f"({label}{number}.{i}) {' '.join(islice(stream, words))}" for i in range(documents)],
        )
        for number, query in enumerate(queries)
    ]


def tracked(rounds: int, what: str) -> Iterable[int]:
    """Round numbers, with progress on standard error."""
    return track(range(rounds), description=what, console=Console(stderr=True), transient=True)


def alternate(
    first: Callable[[int], Any], second: Callable[[int], Any], rounds: int
) -> tuple[list[float], list[float]]:
    """Wall seconds of both, taken in turn; one round of each is not counted."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in tracked(rounds + 1, "alternating"):
        for run, seconds in zip((first, second), times, strict=True):
            start = time.perf_counter()
            run(number)
            seconds.append(time.perf_counter() - start)
    return times[0][1:], times[1][1:]
