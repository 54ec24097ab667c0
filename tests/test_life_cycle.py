"""Calls that are cancelled, and rerankers that are closed while calls run."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
import threading
from collections.abc import Sequence

import pytest
from support.head_sets import CALIBRATED, HEADS

from core_rerank_integrations import CoReReranker, DocumentCache
from core_rerank_integrations.backends.base import AttentionBackend, GroupMass, PromptGroup
from core_rerank_integrations.backends.vllm.caller.loop import EngineLoop
from core_rerank_integrations.errors import ClosedError, InvalidInputError
from core_rerank_integrations.method.prompt import SharedPrefix
from core_rerank_integrations.method.scoring import Mass
from core_rerank_integrations.models.encoder import load_encoder
from core_rerank_integrations.models.local_model import LocalModel
from core_rerank_integrations.scorer import AttentionScorer

QUERY = "Who patented the telephone?"
DOCUMENTS = ["Bread is baked from flour.", "Alexander Graham Bell patented the telephone in 1876."]
NO_CACHE = DocumentCache(memory_bytes=0, disk_bytes=0)


def owning(
    smollm2: LocalModel, backend: AttentionBackend, monkeypatch: pytest.MonkeyPatch
) -> CoReReranker:
    """Return a reranker that closes this backend, on a model that is loaded already."""
    scorer = AttentionScorer(load_encoder(smollm2, HEADS.template), backend)
    monkeypatch.setattr("core_rerank_integrations.reranker.load_scorer", lambda *_: scorer)
    return CoReReranker(smollm2.path, HEADS)


class LoopBackend:
    """A backend whose calls wait for an event loop, as those of vLLM's engine do."""

    def __init__(self, backend: AttentionBackend, loop: asyncio.AbstractEventLoop) -> None:
        self.max_context = backend.max_context
        self.stats = backend.stats
        self.loop = EngineLoop(loop, lambda: None)
        self.begun = asyncio.Event()

    def attention_mass(
        self,
        groups: Sequence[PromptGroup],  # noqa: ARG002
        weights: Mass | None = None,  # noqa: ARG002
    ) -> list[GroupMass]:
        async def endless() -> list[GroupMass]:
            self.begun.set()
            await asyncio.sleep(3600)
            return []

        return self.loop.run(endless())

    def cache_prefixes(self, prefixes: Sequence[SharedPrefix]) -> int:
        raise NotImplementedError

    def clear_cache(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.loop.close()


@pytest.mark.parametrize("how", ["close", "aclose", "async with"])
async def test_closing_on_the_loop_of_the_engine_ends_its_calls(
    how: str, smollm2: LocalModel, reranker: CoReReranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = LoopBackend(reranker.scorer.backend, asyncio.get_running_loop())
    closing = owning(smollm2, backend, monkeypatch)
    calls = [asyncio.create_task(closing.arerank(QUERY, DOCUMENTS)) for _ in range(40)]
    await backend.begun.wait()
    if how == "close":
        closing.close()
    elif how == "aclose":
        await closing.aclose()
    else:
        async with closing:
            pass
    errors = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 10)
    assert {type(error) for error in errors} == {ClosedError}
    with pytest.raises(ClosedError, match="make a new one"):
        await closing.arerank(QUERY, DOCUMENTS)


async def test_closing_ends_calls_that_wait_for_the_model(smollm2: LocalModel) -> None:
    closing = CoReReranker(smollm2.path, CALIBRATED, dtype="float32", document_cache=NO_CACHE)
    documents = [f"{number} grey gulls over the pier" * 10 for number in range(200)]
    calls = [asyncio.create_task(closing.arerank(QUERY, documents)) for _ in range(3)]
    await asyncio.sleep(0.5)
    await closing.aclose()
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(error) for error in errors} == {ClosedError}


async def test_a_cancelled_call_stops_after_the_current_pass(
    calibrated: CoReReranker,
) -> None:
    documents = [f"{number} grey gulls over the pier" * 10 for number in range(300)]
    calibrated.clear_cache()
    before = calibrated.stats.tokens_run
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await calibrated.arerank(QUERY, documents)
    await calibrated.arerank(QUERY, ["the pass of the cancelled call is over"])
    read = calibrated.stats.tokens_run
    await asyncio.sleep(0.5)
    assert calibrated.stats.tokens_run == read
    (prefix,) = calibrated.scorer.encoder.prefixes([documents[:1]])
    assert read - before < 150 * len(prefix.ids)


IMPORTS = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from core_rerank_integrations.models.local_model import LocalModel

together = threading.Barrier(4)

def layers(_):
    together.wait()
    return LocalModel(Path(sys.argv[1]), None).config().num_hidden_layers

with ThreadPoolExecutor(4) as pool:
    assert list(pool.map(layers, range(4))) == [30] * 4
"""


def test_the_first_threads_of_a_program_may_load_at_once(smollm2: LocalModel) -> None:
    """Threads that import Transformers at the same time may get it half initialised."""
    command = [sys.executable, "-W", "ignore", "-c", IMPORTS, smollm2.path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_a_reranker_on_an_engine_of_the_caller_cannot_be_pickled(
    smollm2: LocalModel, reranker: CoReReranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = reranker.scorer
    monkeypatch.setattr("core_rerank_integrations.reranker.load_scorer", lambda *_: scorer)
    shared = CoReReranker(smollm2.path, HEADS, backend="vllm-shared", engine=threading.Lock())
    with pytest.raises(InvalidInputError, match="engine and a reranker of their own"):
        pickle.dumps(shared)
