"""An engine runs in processes of its own: how they begin, and that none outlives its program."""

from __future__ import annotations

import ast
import atexit
import multiprocessing
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from core_rerank_integrations.errors import InvalidInputError

OWNER = "CORE_RERANK_ENGINE_OWNER"
"""In the environment of an engine of ours: process id of the program that started it."""
ENDING_SECONDS = 15.0
"""How long an engine whose program has died may take to end."""


class _Closable(Protocol):
    def close(self) -> None: ...


_open: weakref.WeakSet[_Closable] = weakref.WeakSet()


def check_main_guard() -> None:
    """Refuse to start processes from the top level of a script, which each would run again.

    Raises:
        InvalidInputError: Names the script and the line.
    """
    from vllm.platforms import current_platform
    from vllm.utils.system_utils import get_mp_context

    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    package = getattr(main, "__spec__", None)
    if package is not None and package.name.endswith(".__main__"):
        return  # Of `python -m package`: multiprocessing does not run that again.
    # On CPU, vLLM decides to spawn only once it starts.
    spawns = current_platform.is_cpu() or get_mp_context().get_start_method() == "spawn"
    if path is None or not spawns:
        return
    frame: FrameType | None = sys._getframe()
    while frame is not None and not (
        frame.f_code.co_name == "<module>" and frame.f_globals is vars(main)
    ):
        frame = frame.f_back
    if frame is not None and not _is_guarded(Path(path), frame.f_lineno):
        raise InvalidInputError(
            "vLLM starts processes that each import this script anew: put what runs under "
            f'`if __name__ == "__main__":` ({path}, line {frame.f_lineno})'
        )


@contextmanager
def owned_engine() -> Iterator[None]:
    """An engine that is started in here ends when this program does, however that ends."""
    os.environ[OWNER] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[OWNER]


def close_at_exit(engine: _Closable) -> None:
    """Close an engine at the end of the program, if nobody has before."""
    # Anew each time: what was registered last is called first, and vLLM's own shutdown must find
    # nothing left to end.
    atexit.unregister(_close_all)
    atexit.register(_close_all, os.getpid())
    _open.add(engine)


def end_with_owner() -> None:
    """In the process of an engine: end it when the program that started it is gone."""
    parent: Any = multiprocessing.parent_process()
    if parent is None or os.environ.get(OWNER) != str(parent.pid):
        return

    def end() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)  # vLLM then ends its workers too.
        time.sleep(ENDING_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end, name="core-rerank-owner", daemon=True).start()


def _close_all(owner: int) -> None:
    if os.getpid() != owner:
        return  # A fork of the program: the engines are not its own, nor do their threads run here.
    for engine in list(_open):
        engine.close()


def _is_guarded(path: Path, line: int) -> bool:
    """Whether a line of a script stands in a block that asks for the module's name."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return True  # Not a script of Python source: nothing to tell.
    return any(
        isinstance(node, ast.If)
        and node.lineno <= line <= (node.end_lineno or line)
        and "__name__" in ast.unparse(node.test)
        for node in tree.body
    )
