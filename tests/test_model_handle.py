"""Loading, restarting and closing a model; forks of the process."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support.tiny_models import HEADS, groups, masses, tiny

from core_rerank_integrations.backends.openvino.backend import OpenVINOBackend
from core_rerank_integrations.errors import BackendError, ClosedError, InvalidInputError
from core_rerank_integrations.method.prompt import PromptEncoder
from core_rerank_integrations.method.templates import TEMPLATES
from core_rerank_integrations.model_handle import ModelHandle
from core_rerank_integrations.models.local_model import LocalModel
from core_rerank_integrations.scorer import AttentionScorer

FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
FORK_SECONDS = 20


@pytest.fixture
def load(tmp_path: Path, smollm2: LocalModel) -> Callable[[], AttentionScorer]:
    model = tiny(tmp_path, "llama")
    encoder = PromptEncoder(smollm2.tokenizer().backend_tokenizer, TEMPLATES["plain"])
    return lambda: AttentionScorer(encoder, OpenVINOBackend(model, HEADS, dtype="float32"))


def in_fork(call: Callable[[], object]) -> str:
    """Return the result of a call in a forked process, or its error, as text."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = str(call())
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    deadline = time.monotonic() + FORK_SECONDS
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the fork hangs")
        time.sleep(0.01)
    with os.fdopen(reading) as result:
        return result.read()


def test_restart_and_close(load: Callable[[], AttentionScorer]) -> None:
    handle = ModelHandle(load)
    first = handle.scorer
    expected = masses(first.backend, groups())
    handle.restart()
    assert handle.scorer is not first
    with pytest.raises(ClosedError):
        first.backend.attention_mass(groups())
    for mass, again in zip(expected, masses(handle.scorer.backend, groups()), strict=True):
        np.testing.assert_allclose(again, mass, rtol=0, atol=1e-6)

    borrowed = ModelHandle(load, scorer=handle.scorer)
    with pytest.raises(InvalidInputError, match="a scorer or an engine of your own"):
        borrowed.restart()
    borrowed.close()
    handle.scorer.backend.attention_mass(groups())

    for _ in range(2):
        handle.close()
    for call in (handle.restart, lambda: handle.scorer):
        with pytest.raises(ClosedError, match="make a new one"):
            call()


def test_a_failed_restart_says_why_and_can_be_repeated(load: Callable[[], AttentionScorer]) -> None:
    problems: list[BaseException] = []

    def load_unless_told() -> AttentionScorer:
        if problems:
            raise problems.pop()
        return load()

    handle = ModelHandle(load_unless_told)
    for problem in (OSError("no such folder"), KeyboardInterrupt()):
        problems.append(problem)
        with pytest.raises(type(problem)):
            handle.restart()
        reason = rf"restart of this CoReReranker failed \({type(problem).__name__}: {problem}\)"
        for _ in range(2):
            with pytest.raises(BackendError, match=reason):
                _ = handle.scorer
    handle.restart()
    assert len(masses(handle.scorer.backend, groups())) == 7
    problems.append(OSError("no such folder"))
    with pytest.raises(OSError, match="no such folder"):
        handle.restart()
    handle.close()
    with pytest.raises(ClosedError, match="make a new one"):
        _ = handle.scorer


@pytest.mark.parametrize("fails", [False, True])
def test_threads_that_restart_share_one_load(
    load: Callable[[], AttentionScorer], fails: bool
) -> None:
    loads: list[int] = []
    begun, go = threading.Event(), threading.Event()

    def slow() -> AttentionScorer:
        loads.append(len(loads))
        if len(loads) > 1:
            begun.set()
            assert go.wait(20)
            if fails:
                raise OSError("no such folder")
        return load()

    handle = ModelHandle(slow)
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(handle.restart)
        assert begun.wait(20)
        with pytest.raises(ClosedError, match="is being restarted"):
            _ = handle.scorer
        others = [pool.submit(handle.restart) for _ in range(3)]
        time.sleep(0.1)  # They wait.
        go.set()
        errors = [type(call.exception(20)) for call in (first, *others)]
    assert loads == [0, 1]
    assert errors == ([OSError, *[BackendError] * 3] if fails else [type(None)] * 4)
    handle.close()


def test_closing_during_a_restart_leaves_no_model_open(
    load: Callable[[], AttentionScorer],
) -> None:
    scorers: list[AttentionScorer] = []
    begun, go = threading.Event(), threading.Event()

    def slow() -> AttentionScorer:
        if scorers:
            begun.set()
            assert go.wait(20)
        scorers.append(load())
        return scorers[-1]

    handle = ModelHandle(slow)
    with ThreadPoolExecutor(1) as pool:
        restart = pool.submit(handle.restart)
        assert begun.wait(20)
        handle.close()
        go.set()
        assert isinstance(restart.exception(20), ClosedError)
    for scorer in scorers:
        with pytest.raises(ClosedError):
            scorer.backend.attention_mass(groups())
    with pytest.raises(ClosedError, match="make a new one"):
        _ = handle.scorer


@FORKS
def test_a_fork_is_told_to_load_its_own_model(load: Callable[[], AttentionScorer]) -> None:
    """Even if another thread holds all locks of the model."""
    handle = ModelHandle(load)
    holding, end = threading.Event(), threading.Event()

    def hold() -> None:
        with handle._restarting, handle._changing:
            holding.set()
            end.wait(FORK_SECONDS)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(hold)
        assert holding.wait(20)
        for call in (lambda: handle.scorer, handle.restart):
            message = in_fork(call)
            assert message.startswith(
                f"BackendError: this CoReReranker was loaded in process {os.getpid()}"
            )
            assert "'spawn'" in message
        assert in_fork(handle.close) == "None"
        end.set()
    assert len(masses(handle.scorer.backend, groups())) == 7, "the parent's model is as it was"
    assert in_fork(lambda: len(masses(ModelHandle(load).scorer.backend, groups()))) == "7"
    handle.close()


@FORKS
def test_a_fork_during_a_load_cannot_load(load: Callable[[], AttentionScorer]) -> None:
    begun, go = threading.Event(), threading.Event()

    def slow() -> AttentionScorer:
        begun.set()
        assert go.wait(20)
        return load()

    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(ModelHandle, slow)
        assert begun.wait(20)
        message = in_fork(lambda: ModelHandle(load))
        go.set()
        loading.result(20).close()
    assert message.startswith("BackendError: process ")
    assert f"it was forked while process {os.getpid()} loaded one" in message


SCRIPT = """
import os, pickle, sys
from pathlib import Path
from core_rerank_integrations.backends.openvino.backend import OpenVINOBackend
from core_rerank_integrations.model_handle import ModelHandle
from core_rerank_integrations.models.local_model import LocalModel
from core_rerank_integrations.scorer import AttentionScorer

model = LocalModel(Path(sys.argv[1]), None)
heads, groups = pickle.loads(sys.stdin.buffer.read())
backend = OpenVINOBackend(model, heads, dtype="float32")
handle = ModelHandle(lambda: AttentionScorer(None, backend))
backend.attention_mass(groups)
child = os.fork()
if child == 0:
    del handle, backend
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""


@FORKS
def test_a_fork_ends_without_freeing_the_model(tmp_path: Path) -> None:
    """OpenVINO waits for its threads when a model is freed, and a fork has none."""
    tiny(tmp_path, "llama")
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, tmp_path],
        input=pickle.dumps((HEADS, groups())),
        capture_output=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr.decode()
