"""Calls to the event loop of an engine, without an engine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from core_rerank_integrations._internal.cancellation import run_in_thread
from core_rerank_integrations.backends.vllm.caller.loop import EngineLoop
from core_rerank_integrations.errors import BackendError, ClosedError, InvalidInputError

STOPPED = "event loop that the vLLM engine runs on has stopped"


class ProgramLoop:
    """An event loop of a program, in a thread that can be stopped."""

    def __init__(self) -> None:
        self.asyncio_loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.asyncio_loop.run_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        if self._thread.is_alive():
            self.asyncio_loop.call_soon_threadsafe(self.asyncio_loop.stop)
            self._thread.join(20)

    def close(self) -> None:
        self.stop()
        if not self.asyncio_loop.is_closed():
            for task in asyncio.all_tasks(self.asyncio_loop):
                task.cancel()
            self.asyncio_loop.run_until_complete(asyncio.sleep(0))
            self.asyncio_loop.close()


@pytest.fixture
def program() -> Iterator[ProgramLoop]:
    program = ProgramLoop()
    yield program
    program.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


async def one() -> int:
    return 1


async def endless(begun: threading.Event, ended: threading.Event | None = None) -> None:
    begun.set()
    try:
        await asyncio.sleep(3600)
    finally:
        if ended:
            ended.set()


def waiting(pool: ThreadPoolExecutor, loop: EngineLoop) -> Future[None]:
    """Return a call that waits on the loop."""
    begun = threading.Event()
    call = pool.submit(lambda: loop.run(endless(begun)))
    assert begun.wait(20)
    return call


@pytest.mark.parametrize("end", [ProgramLoop.stop, ProgramLoop.close], ids=["stop", "close"])
def test_a_loop_that_has_stopped_ends_waiting_calls_and_refuses_new_ones(
    program: ProgramLoop, pool: ThreadPoolExecutor, end: Callable[[ProgramLoop], None]
) -> None:
    loop = EngineLoop(program.asyncio_loop, lambda: None)
    assert loop.run(one()) == 1
    call = waiting(pool, loop)
    end(program)
    assert isinstance(call.exception(20), ClosedError)
    with pytest.raises(ClosedError, match=STOPPED):
        loop.run(one())
    for close in (loop.close, loop.stop):
        pool.submit(close).result(20)
    with pytest.raises(ClosedError, match="is closed"):
        loop.run(one())


def test_a_loop_that_stops_while_it_is_closed(
    program: ProgramLoop, pool: ThreadPoolExecutor
) -> None:
    loop = EngineLoop(program.asyncio_loop, lambda: None)
    busy, go = threading.Event(), threading.Event()

    def block() -> None:
        busy.set()
        go.wait(20)
        program.asyncio_loop.stop()

    program.asyncio_loop.call_soon_threadsafe(block)
    assert busy.wait(20)
    closing = pool.submit(loop.finish, asyncio.sleep(3600))
    time.sleep(0.1)
    go.set()
    closing.result(20)


@pytest.mark.parametrize("own", [False, True])
def test_close_ends_waiting_calls(
    program: ProgramLoop, pool: ThreadPoolExecutor, own: bool
) -> None:
    loop = EngineLoop(None if own else program.asyncio_loop, lambda: None)
    calls = [waiting(pool, loop) for _ in range(2)]
    for end in (loop.close, loop.stop, loop.stop):
        pool.submit(end).result(20)
    for call in calls:
        with pytest.raises(ClosedError, match="closed while a call was waiting"):
            call.result(20)
    assert loop.asyncio_loop.is_closed() is own


async def test_on_the_loop_itself_nothing_waits() -> None:
    loop = EngineLoop(asyncio.get_running_loop(), lambda: None)
    begun = asyncio.Event()
    call = asyncio.create_task(asyncio.to_thread(loop.run, _endless(begun)))
    await begun.wait()
    with pytest.raises(InvalidInputError, match=r"await reranker.arerank"):
        loop.run(one())
    loop.close()
    with pytest.raises(ClosedError):
        await asyncio.wait_for(call, 20)


async def _endless(begun: asyncio.Event) -> None:
    begun.set()
    await asyncio.sleep(3600)


async def test_a_cancelled_caller_cancels_its_call(program: ProgramLoop) -> None:
    loop = EngineLoop(program.asyncio_loop, lambda: None)
    begun, ended = threading.Event(), threading.Event()
    caller = asyncio.create_task(run_in_thread(lambda: loop.run(endless(begun, ended))))
    await asyncio.to_thread(begun.wait, 20)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert await asyncio.to_thread(ended.wait, 20)


def test_a_dead_engine_ends_the_waiting(pool: ThreadPoolExecutor) -> None:
    dead = threading.Event()

    def check() -> None:
        if dead.is_set():
            raise BackendError("the engine has died")

    loop = EngineLoop(None, check)
    call = waiting(pool, loop)
    dead.set()
    with pytest.raises(BackendError, match="has died"):
        call.result(20)
    finish: Callable[[], None] = lambda: loop.finish(asyncio.sleep(3600), check)  # noqa: E731
    pool.submit(finish).result(20)
    loop.close()
    loop.stop()
