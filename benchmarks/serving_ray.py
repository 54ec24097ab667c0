"""Throughput on Ray Serve, beside one process of `core-rerank serve`; `make bench-ray`.

Ray starts on this machine, and its replicas share the processors that the one process has for
itself. Every load has lists of its own, so that no document is known before.
"""

from __future__ import annotations

import asyncio
import os
from typing import Annotated

import httpx
import numpy as np
import ray
import typer
from common import machine
from ray import serve
from serving import Lists, ask_all, in_process, lists, percentiles, serving, wrong

from core_rerank_integrations import CoReReranker
from core_rerank_integrations.serving.ray import app

PORT = 8766


def deploy(replicas: int) -> str:
    """Start replicas in place of those before; return the address."""
    serve.delete("default")
    serve.run(app({"replicas": replicas, "num_cpus": max(1, (os.cpu_count() or 1) // replicas)}))
    return f"http://127.0.0.1:{PORT}"


def row(name: str, url: str, asked: Lists, clients: int, base: float | None) -> float:
    """Print a load and return its documents a second: its lists are not as long as others'."""
    with CoReReranker() as reranker:
        expected, _ = in_process(reranker, asked)
    answers, seconds = asyncio.run(ask_all(url, asked, clients))
    rate = sum(len(texts) for _, texts in asked) / seconds
    print(
        f"| {name} | {rate:.2f} | {rate / (base or rate):.2f} | {percentiles(answers)} | "
        f"{wrong(answers, expected)} |",
        flush=True,
    )
    return rate


def main(
    clients: Annotated[int, typer.Option(help="Number of clients.")] = 16,
    count: Annotated[int, typer.Option(help="Number of requests of each load.")] = 160,
    rounds: Annotated[int, typer.Option(help="How often all are measured, in turn.")] = 3,
) -> None:
    """Print a table: one server, one replica, two replicas, round by round."""
    print(machine("openvino", "ray", "fastapi", "uvicorn"))
    columns = ("", "documents a second", "ratio", "p50, ms", "p95, ms", "p99, ms", "wrong")
    # By default, the clients on this machine would come first.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  Ray spells it so.
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="warning")
    serve.start(http_options={"port": PORT})
    try:
        with serving() as (url, _):
            print(f"{count} requests, {clients} clients\n\n| {' | '.join(columns)} |")
            print(f"|{' --- |' * len(columns)}")
            ratios: dict[int, list[float]] = {1: [], 2: []}
            for number in range(rounds):
                base = row("one server", url, lists(count, f"server {number}"), clients, None)
                for replicas, found in ratios.items():
                    on_ray = deploy(replicas)
                    httpx.get(f"{on_ray}/ready").raise_for_status()
                    asked = lists(count, f"{replicas} replicas {number}")
                    name = f"Ray, {replicas} replica{'s' * (replicas > 1)}"
                    found.append(row(name, on_ray, asked, clients, base) / base)
        for replicas, found in ratios.items():
            print(f"\n{replicas}: median ratio {np.median(found):.2f} of {rounds} rounds")
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    typer.run(main)
