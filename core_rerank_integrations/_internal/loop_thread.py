"""An event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future, wait
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from core_rerank_integrations._internal.cancellation import check_cancelled
from core_rerank_integrations.errors import ClosedError

CHECK_SECONDS = 1.0
"""Time between two checks of whether a waiting call is cancelled."""

Resource = TypeVar("Resource")
T = TypeVar("T")
Work = Callable[[Resource], Coroutine[Any, Any, T]]
"""A coroutine function that takes the resource."""


class LoopThread(Generic[Resource]):
    """Run coroutines with a resource that belongs to one event loop, such as an HTTP client.

    Callers may be in any thread and in any event loop. The thread runs until `close`, or until
    nothing refers to this object.

    Args:
        opened: Opens the resource, in the thread.
        name: Name of the thread.
        closed: Message of the `ClosedError` of calls after `close`, and of those it ends.
    """

    def __init__(
        self,
        opened: Callable[[], AbstractAsyncContextManager[Resource]],
        name: str,
        closed: str,
    ) -> None:
        self._closed = closed
        self._is_closed = False
        self._submitting = threading.Lock()  # So that none comes after the last.
        ready: Future[_Running[Resource]] = Future()
        self._thread = threading.Thread(target=_run, args=(opened, ready), name=name, daemon=True)
        self._thread.start()
        self._running = ready.result()
        self._stop = weakref.finalize(self, _stop, self._running, os.getpid())
        self._stop.atexit = False

    def run(self, work: Work[Resource, T]) -> T:
        """Return the result of a coroutine. An interrupted or cancelled caller cancels it.

        Raises:
            ClosedError: The thread was closed, before or meanwhile.
        """
        future = self._submit(work)
        try:
            while not wait([future], timeout=CHECK_SECONDS).done:
                check_cancelled()
            return future.result()
        except CancelledError:
            raise ClosedError(self._closed) from None
        except BaseException:
            future.cancel()
            raise

    async def arun(self, work: Work[Resource, T]) -> T:
        """Return the result of a coroutine without blocking the caller's loop; see `run`.

        Raises:
            CancelledError: The caller was cancelled.
            ClosedError: The thread was closed, before or meanwhile.
        """
        future = self._submit(work)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            caller = cast("asyncio.Task[Any]", asyncio.current_task())
            if self._is_closed and not caller.cancelling():
                raise ClosedError(self._closed) from None
            raise

    def close(self) -> None:
        """Cancel what runs, close the resource, and end the thread."""
        with self._submitting:
            self._is_closed = True
        self._stop()
        self._thread.join()

    def _submit(self, work: Work[Resource, T]) -> Future[T]:
        with self._submitting:
            if self._is_closed:
                raise ClosedError(self._closed)
            running = self._running
            return asyncio.run_coroutine_threadsafe(work(running.resource), running.loop)


@dataclass(frozen=True)
class _Running(Generic[Resource]):
    loop: asyncio.AbstractEventLoop
    stop: asyncio.Event
    resource: Resource


def _run(
    opened: Callable[[], AbstractAsyncContextManager[Resource]],
    ready: Future[_Running[Resource]],
) -> None:
    """Run the thread. It refers to no `LoopThread`, so that one can be freed."""

    async def main() -> None:
        async with opened() as resource:
            stop = asyncio.Event()
            ready.set_result(_Running(asyncio.get_running_loop(), stop, resource))
            await stop.wait()
            work = asyncio.all_tasks() - {asyncio.current_task()}
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)

    try:
        asyncio.run(main())
    except BaseException as error:
        if ready.done():
            raise
        ready.set_exception(error)


def _stop(running: _Running[Any], process: int) -> None:
    if os.getpid() == process:  # A fork has the loop, but not the thread.
        with suppress(RuntimeError):  # The loop has ended.
            running.loop.call_soon_threadsafe(running.stop.set)
