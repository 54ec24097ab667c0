"""The life cycle of a loaded model: load, restart, close, and forks of the process."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable

from core_rerank_integrations.errors import BackendError, ClosedError, InvalidInputError
from core_rerank_integrations.scorer import AttentionScorer

CLOSED = "this CoReReranker is closed; make a new one"
REMEDY = "Load it after the fork, or start processes by multiprocessing's method 'spawn'"

_handles: weakref.WeakSet[ModelHandle] = weakref.WeakSet()
_load_locks: dict[int, threading.Lock] = {}
"""One of each process, because a fork may inherit one that is held. Models are loaded one after the
other: Transformers changes PyTorch's default dtype meanwhile, vLLM environment variables."""
_loading: list[int] = []
"""Process ids of the loads that run. A fork inherits those of its parent, and never sees their end.
"""


class ModelHandle:
    """Own a loaded model. Thread-safe.

    Args:
        load: Loads the model.
        scorer: A loaded scorer of the caller, used instead. It is never closed here.
        can_restart: ``False`` if the model runs in an engine of the caller.

    Raises:
        BackendError: The process was forked while its parent loaded a model.
    """

    def __init__(
        self,
        load: Callable[[], AttentionScorer],
        scorer: AttentionScorer | None = None,
        can_restart: bool = True,
    ) -> None:
        self._load = load
        self._owns_scorer = scorer is None
        self._can_restart = can_restart and scorer is None
        self._process = os.getpid()
        _handles.add(self)
        self._restarting = threading.Lock()
        self._restarts = 0
        self._failure: BaseException | None = None
        self._changing = threading.Lock()  # Of the two attributes below.
        self._is_closed = False
        self._scorer: AttentionScorer | None = scorer or self._loaded()

    @property
    def is_in_fork(self) -> bool:
        """Whether this process is a fork of the one that loaded the model."""
        return os.getpid() != self._process

    @property
    def scorer(self) -> AttentionScorer:
        """The loaded scorer.

        Raises:
            ClosedError: The handle is closed, or is being restarted.
            BackendError: The last restart failed, or the process was forked after the load.
        """
        self._check_process()
        scorer = self._scorer
        if scorer is not None:
            return scorer
        if self._is_closed:
            raise ClosedError(CLOSED)
        self._check_restart()
        raise ClosedError("this CoReReranker is being restarted; call it again after that")

    @property
    def is_alive(self) -> bool:
        """Whether the model answers: it is loaded, and vLLM's engine has not died."""
        scorer = self._scorer
        return scorer is not None and scorer.backend.is_alive

    def restart(self) -> None:
        """Load the model again. Waiting calls end with an error.

        Threads that call this at the same time share one restart. After a failed one, this can be
        called again.

        Raises:
            ClosedError: The handle is closed.
            InvalidInputError: The scorer or its engine belongs to the caller.
            BackendError: The restart that another thread had begun failed, or the process was
                forked after the load.
        """
        if not self._can_restart:
            raise InvalidInputError(
                "this reranker uses a scorer or an engine of your own; start that again and "
                "make a new reranker with it"
            )
        self._check_process()
        restarts = self._restarts
        with self._restarting:
            if self._restarts != restarts:
                _ = self.scorer  # Another thread has restarted it, or failed to.
                return
            try:
                self._restart()
            finally:
                self._restarts += 1

    def close(self) -> None:
        """Free the model. Closing twice has no effect, and neither has closing it in a fork."""
        if self.is_in_fork:
            return
        with self._changing:
            self._is_closed = True
            scorer, self._scorer = self._scorer, None
        if scorer is not None and self._owns_scorer:
            scorer.close()

    def _restart(self) -> None:
        with self._changing:
            if self._is_closed:
                raise ClosedError(CLOSED)
            before, self._scorer, self._failure = self._scorer, None, None
        try:
            if before is not None:
                before.close()
            scorer = self._loaded()
        except BaseException as error:
            self._failure = error
            raise
        with self._changing:
            is_closed = self._is_closed
            if not is_closed:
                self._scorer = scorer
        if is_closed:
            scorer.close()
            raise ClosedError(CLOSED)

    def _loaded(self) -> AttentionScorer:
        process = os.getpid()
        if any(loading != process for loading in _loading):
            raise BackendError(
                f"process {process} cannot load a model: it was forked while process {_loading[0]} "
                f"loaded one, so locks of that load are never released here. {REMEDY}"
            )
        with _load_locks.setdefault(process, threading.Lock()):
            _loading.append(process)
            try:
                return self._load()
            finally:
                _loading.remove(process)

    def _check_restart(self) -> None:
        failure = self._failure
        if failure is not None:
            raise BackendError(
                f"the restart of this CoReReranker failed ({type(failure).__name__}: {failure}); "
                "call restart() again, or make a new one"
            ) from failure

    def _check_process(self) -> None:
        if self.is_in_fork:
            raise BackendError(
                f"this CoReReranker was loaded in process {self._process}, and process "
                f"{os.getpid()} is a fork, which has none of the model's threads. {REMEDY}"
            )


def _keep_models() -> None:
    """Keep the models of the parent in a fork: freeing one waits for threads that are not here."""
    for handle in list(_handles):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(handle))


if hasattr(os, "register_at_fork"):  # Not on Windows.
    os.register_at_fork(after_in_child=_keep_models)
