"""Calls that are cancelled, and rerankers that are closed while calls run."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
import threading

import pytest
from support.head_sets import CALIBRATED, HEADS

from core_rerank_integrations import CoReReranker, DocumentCache
from core_rerank_integrations.errors import ClosedError, InvalidInputError
from core_rerank_integrations.models.local_model import LocalModel

QUERY = "Who patented the telephone?"
DOCUMENTS = ["Bread is baked from flour.", "Alexander Graham Bell patented the telephone in 1876."]
NO_CACHE = DocumentCache(memory_bytes=0, disk_bytes=0)


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
