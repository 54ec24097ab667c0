"""Shared parts of the benchmarks: prompts, and timing of two things against each other."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from itertools import cycle, islice
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from core_rerank_integrations import HeadSet
from core_rerank_integrations._internal.resources import resource_folder
from core_rerank_integrations.method.prompt import PromptEncoder
from core_rerank_integrations.research.collection import Collection

T = TypeVar("T")

MODEL = "smollm2-135m"
HEADS = HeadSet.from_pairs(
    [(18, 7), (17, 3), (14, 3), (17, 4)],
    name="four",
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    template="chatml",
    scoring={"documents_per_prompt": 20},
)
"""Always the same, so that figures of different days can be compared."""
WORDS = 78
"""Number of words of a document of about 110 tokens."""
NQ_WORDS = 11
"""Maximum number of words of a question like those of Natural Questions, nine on average."""
LONG_WORDS = 290
"""Number of words of a document of about 400 tokens."""


def machine(*packages: str) -> str:
    """Return date, machine and versions, the line above every table."""
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
    """Return queries of the demo with distinct passages.

    Args:
        count: Number of queries.
        documents: Number of passages per query.
        words: Number of words of a passage, from the demo's handbook.
        label: Distinguishes the lists of one call from those of another.
        longest_query: Maximum number of words of a query.
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


def prompt_ids(encoder: PromptEncoder, query: str, documents: Sequence[str]) -> torch.Tensor:
    """Return the token ids of one prompt of all documents, shape [1, tokens]."""
    question, (prefix,) = encoder.question(query), encoder.prefixes([documents])
    ids = np.concatenate((question.prefix_of(prefix).ids, question.ids))
    return torch.as_tensor(ids)[None]


def tracked(items: Sequence[T], description: str) -> Iterable[T]:
    """Return items with a progress bar on standard error that disappears at the end."""
    console = Console(stderr=True)
    return track(items, description=description, console=console, transient=True)


def alternate(
    first: Callable[[int], Any], second: Callable[[int], Any], rounds: int
) -> tuple[list[float], list[float]]:
    """Return wall seconds of both, which run in turn; one round of each does not count."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in tracked(range(rounds + 1), "alternating"):
        for run, seconds in zip((first, second), times, strict=True):
            start = time.perf_counter()
            run(number)
            seconds.append(time.perf_counter() - start)
    return times[0][1:], times[1][1:]
