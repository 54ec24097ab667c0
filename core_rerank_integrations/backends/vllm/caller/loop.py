"""Calls from any thread to coroutines on one event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, wait
from typing import Any, TypeVar, cast

from core_rerank_integrations.errors import ClosedError, InvalidInputError

CHECK_SECONDS = 1.0
"""Time between two checks of a waiting call."""
CANCEL_SECONDS = 5.0
"""Time limit for cancelled calls to end."""

T = TypeVar("T")


class EngineLoop:
    """Run coroutines on the event loop of an engine, for callers in any thread. Thread-safe.

    Args:
        loop: The loop; ``None`` starts one in a thread of its own.
        check: Called about once a second while a caller waits. An error that it raises ends the
            waiting.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop | None, check: Callable[[], None]) -> None:
        self.asyncio_loop = loop or asyncio.new_event_loop()
        self.is_own = loop is None
        self.is_closed = False
        self._check = check
        self._calls: set[asyncio.Task[Any]] = set()
        self._thread = threading.Thread(
            target=self.asyncio_loop.run_forever, name="core-rerank-vllm", daemon=True
        )
        if self.is_own:
            self._thread.start()

    @property
    def is_current(self) -> bool:
        """Whether the caller runs on this loop, so that waiting would block it."""
        try:
            return asyncio.get_running_loop() is self.asyncio_loop
        except RuntimeError:
            return False

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of a coroutine. An interrupted caller cancels it.

        Raises:
            ClosedError: The loop is closed, or is closed while the coroutine runs.
            InvalidInputError: The caller runs on this loop.
        """
        if self.is_closed:
            work.close()
            raise ClosedError("the vLLM engine of this reranker is closed")
        if self.is_current:
            work.close()
            raise InvalidInputError(
                "this call would block the event loop that the vLLM engine runs on; use "
                "`await reranker.arerank(...)` there"
            )
        future = asyncio.run_coroutine_threadsafe(self._registered(work), self.asyncio_loop)
        try:
            while not wait([future], timeout=CHECK_SECONDS).done:
                self._check()
            return future.result()
        except CancelledError as error:
            raise ClosedError("the vLLM engine was closed while a call was waiting") from error
        except BaseException:
            future.cancel()
            raise

    def finish(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run a coroutine, also if calls are refused; wait for it unless that blocks the loop."""
        future = asyncio.run_coroutine_threadsafe(work, self.asyncio_loop)
        if not self.is_current:
            future.result()

    def close(self) -> None:
        """Refuse new calls and cancel those that wait. Each then ends with a `ClosedError`.

        On a loop that was started here, everything else is cancelled after that.
        """
        self.is_closed = True
        self.finish(self._cancel())

    def stop(self) -> None:
        """End the loop if it was started here."""
        self.is_closed = True
        if self.is_own:
            self.asyncio_loop.call_soon_threadsafe(self.asyncio_loop.stop)
            self._thread.join()
            self.asyncio_loop.close()

    async def _registered(self, work: Coroutine[Any, Any, T]) -> T:
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._calls.add(task)
        try:
            return await work
        finally:
            self._calls.discard(task)

    async def _cancel(self) -> None:
        for call in self._calls:
            call.cancel()
        if self._calls:
            await asyncio.wait(self._calls, timeout=CANCEL_SECONDS)
        if self.is_own:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
