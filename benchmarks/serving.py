"""Load on a rerank server: throughput, latency, fairness and memory; `make bench-serving`.

The server is a process of its own, `core-rerank serve` with the default model. Every answer is
compared with one that was computed before, in this process.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple

import httpx
import numpy as np
import psutil
import typer
from common import machine, requests, tracked
from prometheus_client.parser import text_string_to_metric_families

from core_rerank_integrations import CoReReranker

MAX_DIFFERENCES = {"auto": 0.05, "float32": 1e-3}
"""Of a score, when other lists are read with it; more counts as wrong."""
LONG_LIST = 1000
POINTS = 10
"""Number of rows of the table of memory."""
KNOWN = 600
"""Number of documents, about, that are asked about again and again."""
NEW = 0.05
"""Share of new documents in the lists that memory is measured with."""

Lists = Sequence[tuple[str, list[str]]]


class Answer(NamedTuple):
    """What came back.

    Attributes:
        scores: Score of each document, in the order of the request.
        seconds: Time of the request.
    """

    scores: np.ndarray
    seconds: float


def lists(count: int, label: str) -> list[tuple[str, list[str]]]:
    """Return lists of 1 to 12 documents of 10 to 80 words."""
    draw = random.Random(label)
    return [
        (query, [" ".join(text.split()[: draw.randint(10, 80)]) for text in texts])
        for number in range(count)
        for query, texts in requests(1, draw.randint(1, 12), label=f"{label}{number}.")
    ]


def known() -> list[str]:
    """Return about `KNOWN` documents that are asked about again and again."""
    return [text for _, texts in lists(KNOWN // 6, "known") for text in texts]


def known_lists(count: int, label: str) -> list[tuple[str, list[str]]]:
    """Return lists of 1 to 20 of the known documents, each with a question of its own."""
    draw, pool = random.Random(label), known()
    return [
        (f"{query} {label} {number}", draw.choices(pool, k=draw.randint(1, 20)))
        for number, (query, _) in enumerate(requests(count, 1))
    ]


def varied_lists(count: int) -> list[tuple[str, list[str]]]:
    """Return lists of 1 to 20 documents: most are known, and new ones have 5 to 300 words."""
    draw, number = random.Random("varied"), itertools.count()

    def document(text: str) -> str:
        if draw.random() >= NEW:
            return text
        words = text.split()
        length = draw.randint(5, 300)
        return " ".join([f"({next(number)})", *itertools.islice(itertools.cycle(words), length)])

    return [
        (query, [document(text) for text in texts]) for query, texts in known_lists(count, "varied")
    ]


@contextmanager
def serving(dtype: str = "auto") -> Iterator[tuple[str, psutil.Process]]:
    """Run a server until the block ends.

    Yields:
        Its address and its process.

    Raises:
        SystemExit: It ended before it was ready.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun = time.perf_counter()
    command = Path(sys.executable).with_name("core-rerank")
    process = subprocess.Popen([command, "serve", "--port", str(port), "--dtype", dtype])
    url = f"http://127.0.0.1:{port}"
    try:
        while not _is_ready(url):
            if process.poll() is not None:
                raise SystemExit("the server ended")
            time.sleep(0.1)
        print(f"ready after {time.perf_counter() - begun:.1f} s\n")
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


@asynccontextmanager
async def client(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)
    ) as connected:
        yield connected


async def ask(connected: httpx.AsyncClient, query: str, texts: list[str]) -> Answer:
    begun = time.perf_counter()
    reply = await connected.post("/v2/rerank", json={"query": query, "documents": texts})
    reply.raise_for_status()
    scores = np.full(len(texts), np.nan)
    for result in reply.json()["results"]:
        scores[result["index"]] = result["core_rerank"]["score"]
    return Answer(scores, time.perf_counter() - begun)


async def ask_all(url: str, asked: Lists, clients: int) -> tuple[list[Answer], float]:
    """Send all requests, each client one after the other; return the answers and the time."""
    answers: list[Answer | None] = [None] * len(asked)
    numbers = iter(range(len(asked)))

    async with client(url) as connected:

        async def work() -> None:
            for number in numbers:
                answers[number] = await ask(connected, *asked[number])

        begun = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(clients)))
        seconds = time.perf_counter() - begun
    return [answer for answer in answers if answer is not None], seconds


def differences(answers: Sequence[Answer], expected: Sequence[np.ndarray]) -> np.ndarray:
    """Return the largest difference of a score in each answer from that of the library."""
    return np.array(
        [
            np.abs(answer.scores - scores).max()
            for answer, scores in zip(answers, expected, strict=True)
        ]
    )


def wrong(answers: Sequence[Answer], expected: Sequence[np.ndarray], dtype: str = "auto") -> int:
    """Count answers with a score that is missing or too far from that of the library."""
    # A missing score is not a number, and not below anything.
    return int(np.count_nonzero(~(differences(answers, expected) <= MAX_DIFFERENCES[dtype])))


def percentiles(answers: Sequence[Answer]) -> str:
    values = np.percentile([answer.seconds for answer in answers], (50, 95, 99)) * 1000
    return " | ".join(f"{value:.0f}" for value in values)


def in_process(reranker: CoReReranker, asked: Lists) -> tuple[list[np.ndarray], float]:
    """Rerank in this process, one list after the other; return the scores and the time."""
    found = []
    begun = time.perf_counter()
    for query, texts in asked:
        scores = np.zeros(len(texts))
        for result in reranker.rerank(query, texts):
            scores[result.index] = result.score
        found.append(scores)
    return found, time.perf_counter() - begun


def load(url: str, reranker: CoReReranker, sets: Sequence[Lists], clients: int, dtype: str) -> None:
    """Compare the library, one client and many clients, in turn, each with a set of its own.

    Args:
        url: Address of the server.
        reranker: The library, with the model of the server.
        sets: Three sets of lists.
        clients: Number of clients.
        dtype: Precision of both.
    """
    count = len(sets[0])
    (_, base), *expected = [in_process(reranker, asked) for asked in sets]
    columns = (
        "",
        "requests a second",
        "ratio",
        "p50, ms",
        "p95, ms",
        "p99, ms",
        "largest difference",
        "wrong",
    )
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    print(f"| in process, one list at a time | {count / base:.2f} | 1.00 | | | | | |", flush=True)
    for name, asked, (scores, _), number in zip(
        ("1 client", f"{clients} clients"), sets[1:], expected, (1, clients), strict=True
    ):
        answers, seconds = asyncio.run(ask_all(url, asked, number))
        print(
            f"| {name} | {count / seconds:.2f} | {base / seconds:.2f} | {percentiles(answers)} | "
            f"{differences(answers, scores).max():.2g} | {wrong(answers, scores, dtype)} |",
            flush=True,
        )


def compare(url: str, dtype: str, clients: int, count: int) -> None:
    """Print two tables of load, one with new documents and one with known ones."""
    with CoReReranker(dtype=dtype) as reranker:
        in_process(reranker, lists(8, "first"))
        print(f"{count} requests each, new documents\n")
        load(url, reranker, [lists(count, f"load {i}") for i in range(3)], clients, dtype)
        print(f"\n{count} requests each, known documents\n")
        pool = known()
        first = [("first", pool[start : start + 20]) for start in range(0, len(pool), 20)]
        in_process(reranker, first)
        asyncio.run(ask_all(url, first, 1))
        load(url, reranker, [known_lists(count, f"known {i}") for i in range(3)], clients, dtype)


async def fairness(url: str, count: int) -> None:
    """Measure short requests alone, and beside a client with long lists."""
    short = [lists(count, f"{name} short") for name in ("alone", "beside")]
    ((query, long),) = requests(1, LONG_LIST, label="long")
    async with client(url) as connected:
        for asked, name in zip(short, ("alone", f"beside lists of {LONG_LIST}"), strict=True):
            beside = None
            if name != "alone":
                beside = asyncio.create_task(ask(connected, query, long))
                await asyncio.sleep(1)
            answers = [await ask(connected, question, texts[:5]) for question, texts in asked]
            is_over = beside is not None and beside.done()
            print(f"| {name} | {count} | {percentiles(answers)} |" + " (ended)" * is_over)
            if beside is not None:
                await beside


def memory(url: str, process: psutil.Process, count: int) -> None:
    """Print the memory of the server after every tenth of the requests, from 16 clients."""
    print("\n| requests | MiB | of them for cached documents |\n| --- | --- | --- |")
    asked = varied_lists(count)
    step = max(1, count // POINTS)
    for start in tracked(range(0, count, step), "Requests"):
        asyncio.run(ask_all(url, asked[start : start + step], 16))
        size, cached = process.memory_info().rss, cached_bytes(url)
        print(f"| {start + step} | {size / 2**20:.0f} | {cached / 2**20:.0f} |", flush=True)


def cached_bytes(url: str) -> float:
    """Return the size of the documents in the server's memory."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == "core_rerank_cached_bytes"
    )


def main(
    dtype: Annotated[str, typer.Option(help="Precision: auto or float32.")] = "auto",
    clients: Annotated[int, typer.Option(help="Number of clients.")] = 64,
    count: Annotated[int, typer.Option(help="Number of requests of each kind of load.")] = 320,
    short: Annotated[int, typer.Option(help="Number of short requests, for fairness.")] = 60,
    memory_requests: Annotated[int, typer.Option(help="Number of requests, for memory.")] = 5000,
) -> None:
    """Print tables: load, fairness, memory. A number of 0 leaves one out."""
    print(machine("openvino", "fastapi", "uvicorn"))
    with serving(dtype) as (url, process):
        if count:
            compare(url, dtype, clients, count)
        if short:
            print(f"\n| short requests | number | p50, ms | p95, ms | p99, ms |\n|{' --- |' * 5}")
            asyncio.run(fairness(url, short))
        if memory_requests:
            memory(url, process, memory_requests)


if __name__ == "__main__":
    typer.run(main)
