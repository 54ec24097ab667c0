"""Calls from any thread to coroutines on one event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future, wait
from contextlib import suppress
from typing import Any, TypeVar, cast

from core_rerank_integrations._internal.cancellation import check_cancelled
from core_rerank_integrations.errors import ClosedError, CoReError, InvalidInputError

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
            ClosedError: The loop is closed or does not run, or this changes while the coroutine
                runs.
            InvalidInputError: The caller runs on this loop.
        """
        try:
            if self.is_closed:
                raise ClosedError("the vLLM engine of this reranker is closed")
            if self.is_current:
                raise InvalidInputError(
                    "this call would block the event loop that the vLLM engine runs on; use "
                    "`await reranker.arerank(...)` there"
                )
            self._check_running()
        except BaseException:
            work.close()
            raise
        future = asyncio.run_coroutine_threadsafe(self._registered(work), self.asyncio_loop)
        try:
            self._wait(future, self._check_running, self._check, check_cancelled)
            return future.result()
        except CancelledError as error:
            raise ClosedError("the vLLM engine was closed while a call was waiting") from error
        except BaseException:
            if not self.asyncio_loop.is_closed():
                future.cancel()
            raise

    def finish(self, work: Coroutine[Any, Any, Any], *checks: Callable[[], None]) -> None:
        """Run a coroutine, also if calls are refused; wait for it unless that blocks the loop.

        Nothing happens on a loop that does not run, because its engine has ended too.

        Args:
            work: The coroutine.
            *checks: Called about once a second. A `CoReError` that one raises ends the waiting.
        """
        if not self._runs:
            work.close()
            return
        future = asyncio.run_coroutine_threadsafe(work, self.asyncio_loop)
        if not self.is_current:
            with suppress(CoReError):
                self._wait(future, self._check_running, *checks)
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
        if self.is_own and self._runs:
            self.asyncio_loop.call_soon_threadsafe(self.asyncio_loop.stop)
            self._thread.join()
            self.asyncio_loop.close()

    @property
    def _runs(self) -> bool:
        return self._thread.is_alive() if self.is_own else self.asyncio_loop.is_running()

    def _check_running(self) -> None:
        if not self._runs:
            raise ClosedError(
                "the event loop that the vLLM engine runs on has stopped, and the engine with it; "
                "make a new engine and a new reranker inside of a loop that keeps running"
            )

    @staticmethod
    def _wait(future: Future[Any], *checks: Callable[[], None]) -> None:
        """Wait for a call while none of ``checks`` raises an error."""
        while not wait([future], timeout=CHECK_SECONDS).done:
            for check in checks:
                check()

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
