"""The processes of an engine: how they begin, and that none outlives its program."""

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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from traceback import walk_stack
from typing import Any

from core_rerank_integrations.errors import InvalidInputError

OWNER = "CORE_RERANK_ENGINE_OWNER"
"""Environment variable of an engine's processes: process id of the program that started it."""
COORDINATOR = "DPCoordinator"
"""In the name of the process that coordinates data parallel engines."""
ENDING_SECONDS = 15.0
"""Time limit for an engine to end after its program has died."""

_starting = threading.Lock()
_open_engines: weakref.WeakSet[Any] = weakref.WeakSet()


def check_main_guard() -> None:
    """Check that a script does not start processes from its top level, which each would run again.

    Raises:
        InvalidInputError: It does; the message names the script and the line.
    """
    from vllm.platforms import current_platform
    from vllm.utils.system_utils import get_mp_context

    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name.endswith(".__main__"):
        return  # multiprocessing does not run the main module of `python -m package` again.
    # On CPU, vLLM decides to spawn only when it starts.
    spawns = current_platform.is_cpu() or get_mp_context().get_start_method() == "spawn"
    if path is None or not spawns:
        return
    lines = [
        line
        for frame, line in walk_stack(sys._getframe())
        if frame.f_code.co_name == "<module>" and frame.f_globals is vars(main)
    ]
    if lines and not is_guarded(Path(path), lines[0]):
        raise InvalidInputError(
            "vLLM starts processes that each import this script anew: put what runs under "
            f'`if __name__ == "__main__":` ({path}, line {lines[0]})'
        )


def is_guarded(path: Path, line: int) -> bool:
    """Return whether a line of a script is inside a block that checks the module's name."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return True  # It is not a script of Python source.
    return any(
        isinstance(node, ast.If)
        and node.lineno <= line <= (node.end_lineno or line)
        and "__name__" in ast.unparse(node.test)
        for node in tree.body
    )


def engine_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that vLLM needs in an environment."""
    # vLLM reports to a server otherwise.
    variables = {"VLLM_NO_USAGE_STATS": environment.get("VLLM_NO_USAGE_STATS", "1")}
    if "OMP_NUM_THREADS" in environment:
        # On CPU, every engine would take the same processors, whatever this number is.
        binding = "VLLM_CPU_OMP_THREADS_BIND"
        variables[binding] = environment.get(binding, "nobind")
    return variables


@contextmanager
def owned_engine() -> Iterator[None]:
    """Make an engine that starts in the block end with this program; see `end_with_owner`.

    Engines start one after the other, because vLLM too sets environment variables for a start.
    """
    with _starting:
        os.environ[OWNER] = str(os.getpid())
        os.environ.update(engine_variables(os.environ))
        try:
            yield
        finally:
            del os.environ[OWNER]


def end_with_owner() -> None:
    """End this process, if it is an engine's, when the program that started the engine has died."""
    parent: Any = multiprocessing.parent_process()
    if parent is None or os.environ.get(OWNER) != str(parent.pid):
        return
    import psutil

    # The coordinator of data parallel engines loads no plugins, and would not end by itself.
    siblings = psutil.Process(parent.pid).children()

    def end() -> None:
        parent.join()
        for sibling in siblings:
            with suppress(psutil.Error):
                if COORDINATOR in sibling.name() + "".join(sibling.cmdline()):
                    sibling.terminate()
        os.kill(os.getpid(), signal.SIGTERM)  # vLLM then ends its workers too.
        time.sleep(ENDING_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end, name="core-rerank-owner", daemon=True).start()


def close_at_exit(engine: Any) -> None:
    """Call ``engine.close()`` at the end of the program."""
    # Handlers run in reverse order, and vLLM's own, registered before, must find nothing to end.
    atexit.unregister(close_all)
    atexit.register(close_all, os.getpid())
    _open_engines.add(engine)


def close_all(owner: int) -> None:
    """Close all engines, unless this is a fork of ``owner``: their threads do not run in a fork."""
    if os.getpid() == owner:
        for engine in list(_open_engines):
            engine.close()
