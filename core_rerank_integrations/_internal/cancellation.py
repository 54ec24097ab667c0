"""Blocking calls of coroutines: they run in a thread, and stop when the coroutine is cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from contextvars import ContextVar, copy_context
from typing import TypeVar

from core_rerank_integrations._internal.warnings import remember_caller

T = TypeVar("T")

_cancelled: ContextVar[threading.Event | None] = ContextVar("core_rerank_cancelled", default=None)


async def run_in_thread(call: Callable[[], T], executor: Executor | None = None) -> T:
    """Return the result of a blocking call without blocking the event loop.

    If the awaiting task is cancelled, the call ends at its next `check_cancelled`. Threads cannot
    be interrupted, and a program does not end before its threads do.

    Args:
        call: The call.
        executor: Where it runs; ``None`` for the loop's own executor.
    """
    cancelled = threading.Event()
    # The caller's context makes traces show the caller's span as the parent.
    context = copy_context()
    context.run(_cancelled.set, cancelled)
    context.run(remember_caller)
    try:
        return await asyncio.get_running_loop().run_in_executor(executor, context.run, call)
    finally:
        cancelled.set()


def check_cancelled() -> None:
    """End a call of `run_in_thread` whose result nobody awaits any more.

    Raises:
        CancelledError: The awaiting task was cancelled.
    """
    cancelled = _cancelled.get()
    if cancelled is not None and cancelled.is_set():
        raise asyncio.CancelledError
