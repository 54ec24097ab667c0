"""What the backends of this process share, on each of them: cached prefixes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_models import (
    HEADS,
    VOCABULARY,
    assert_close,
    groups,
    masses,
    prefix,
    tiny,
)
from transformers import AutoConfig, AutoModelForCausalLM

from core_rerank_integrations import DocumentCache, HeadSet
from core_rerank_integrations.backends.base import PromptGroup
from core_rerank_integrations.backends.local import backend as backend_module
from core_rerank_integrations.backends.local.backend import LocalBackend, PrefixRun
from core_rerank_integrations.backends.openvino import backend as openvino_backend
from core_rerank_integrations.backends.openvino.backend import OpenVINOBackend
from core_rerank_integrations.backends.openvino.runtime import openvino
from core_rerank_integrations.backends.transformers import backend as transformers_backend
from core_rerank_integrations.backends.transformers.backend import TransformersBackend
from core_rerank_integrations.errors import ClosedError, InvalidInputError, StorageError
from core_rerank_integrations.models.local_model import LocalModel

Load = Callable[..., LocalBackend]
TOLERANCES = {"float32": 1e-6, "bfloat16": 1e-2, "int8": 5e-2}


@pytest.fixture(params=[TransformersBackend, OpenVINOBackend], ids=["transformers", "openvino"])
def load(request: pytest.FixtureRequest) -> Load:
    def loaded(model: LocalModel, heads: HeadSet = HEADS, **settings: Any) -> LocalBackend:
        backend: LocalBackend = request.param(model, heads, **{"dtype": "float32", **settings})
        return backend

    return loaded


@pytest.fixture
def no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``dtype="auto"`` compute in float32: only keys and values are rounded."""
    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: [])
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)


def tokens_run(backend: LocalBackend, groups: Sequence[PromptGroup]) -> int:
    """Return the number of tokens that the model runs for these groups."""
    before = backend.stats.tokens_run
    backend.attention_mass(groups)
    return backend.stats.tokens_run - before


def question_tokens(groups: Sequence[PromptGroup]) -> int:
    return sum(len(question) for group in groups for question in group.questions)


def all_tokens(groups: Sequence[PromptGroup]) -> int:
    prefixes = sum(len(group.prefix.ids) + len(group.prefix.baseline) for group in groups)
    return prefixes + question_tokens(groups)


def test_a_cached_document_costs_the_tokens_of_the_question(load: Load, tmp_path: Path) -> None:
    backend = load(tiny(tmp_path, "llama"))
    shared, short, _ = groups()
    first, second = (PromptGroup(shared.prefix, [question]) for question in shared.questions)
    before = masses(backend, [second])
    assert backend.stats.tokens_run == all_tokens([second])
    assert tokens_run(backend, [first]) == question_tokens([first])
    assert tokens_run(backend, [short, second]) == all_tokens([short]) + question_tokens([second])
    assert_close(masses(backend, [second]), before)
    backend.clear_cache()
    assert backend.stats[1:3] == (0, 0)
    assert tokens_run(backend, [second]) == all_tokens([second]), "it is read again"


def test_the_model_counts_the_same_tokens(tmp_path: Path) -> None:
    backend = TransformersBackend(tiny(tmp_path, "llama"), HEADS, dtype="float32")
    ran: list[int] = []
    torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, _: (
            ran.append(inputs[0].numel()) if isinstance(module, torch.nn.Embedding) else None
        )
    )
    backend.attention_mass(groups())
    backend.attention_mass(groups())
    assert sum(ran) == backend.stats.tokens_run


def test_batches_do_not_follow_the_order_of_documents(load: Load, tmp_path: Path) -> None:
    """Neither does the rounding of a score."""
    backend = load(tiny(tmp_path, "llama"))
    draw = np.random.default_rng(0)
    baseline = draw.integers(3, VOCABULARY, 3)
    requests = [
        PromptGroup(
            prefix(draw.integers(3, VOCABULARY, 20), 0, baseline),
            [draw.integers(3, VOCABULARY, 5)],
        )
        for _ in range(6)
    ]
    passes: list[list[bytes]] = []
    forward = backend._forward

    def recorded(runs: Sequence[PrefixRun], keep: bool) -> Any:
        passes.append([run.prefix.key for run in runs])
        return forward(runs, keep)

    backend._forward = recorded
    backend.attention_mass(requests)
    backend.clear_cache()
    backend.attention_mass(requests[::-1])
    half = len(passes) // 2
    assert passes[:half] == passes[half:]
    assert len({key for keys in passes for key in keys}) > 1


def test_the_cache_in_memory_is_bounded(load: Load, tmp_path: Path) -> None:
    model = tiny(tmp_path, "llama")
    plain = masses(load(model), groups())
    stats = []
    for limit in (0, 40_000, 1 << 30):
        backend = load(model, document_cache=DocumentCache(memory_bytes=limit))
        for _ in range(2):
            assert_close(masses(backend, groups()), plain)
        stats.append(backend.stats)
    assert stats[0][1:3] == (0, 0)
    assert stats[1].prefixes_cached in (1, 2)
    assert stats[1].bytes_cached <= 40_000
    prefixes = [group.prefix for group in groups()]
    tokens = sum(len(prefix.ids) for prefix in prefixes)
    keys_and_values = (4 + 3) * 2 * 8 * 4  # Layers, key heads, head size, bytes.
    masses_bytes = sum(prefix.context_length + 1 for prefix in prefixes) + tokens
    assert stats[2][1:3] == (3, tokens * keys_and_values + masses_bytes * len(HEADS.heads) * 4)


@pytest.mark.usefixtures("no_bfloat16")
def test_keys_and_values_are_cached_in_eight_bits(load: Load, tmp_path: Path) -> None:
    cache = DocumentCache(folder=tmp_path / "documents")
    backend = load(tiny(tmp_path / "model", "llama"), dtype="auto", document_cache=cache)
    prefixes = [group.prefix for group in groups()]
    written = backend.cache_prefixes(prefixes)
    tokens = sum(len(prefix.ids) for prefix in prefixes)
    keys_and_values = (4 + 3) * 2 * (8 + 4)  # Layers, key heads, head size, bytes of a scale.
    masses_bytes = sum(prefix.context_length + 1 for prefix in prefixes) + tokens
    expected = tokens * keys_and_values + masses_bytes * len(HEADS.heads) * 4
    assert backend.stats.bytes_cached == expected
    assert expected < written < expected + 3 * 2500, "names and shapes"


@pytest.mark.usefixtures("no_bfloat16")
def test_rounded_documents_get_the_same_mass_new_and_cached(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once and in pieces, from memory and from disk."""
    model = tiny(tmp_path / "model", "llama")
    exact = masses(load(model), groups())
    cache = DocumentCache(folder=tmp_path / "documents")
    backend = load(model, dtype="auto", document_cache=cache)
    new = masses(backend, groups())
    assert_close(masses(backend, groups()), new)
    backend.cache_prefixes([group.prefix for group in groups()])
    backend.clear_cache()
    assert_close(masses(backend, groups()), new)
    monkeypatch.setattr(openvino_backend, "MAX_PIECE_TOKENS", 25)
    nothing = DocumentCache(memory_bytes=0, disk_bytes=0)
    assert_close(masses(load(model, dtype="auto", document_cache=nothing), groups()), new)
    differences = [np.abs(mass - other).max() for mass, other in zip(new, exact, strict=True)]
    assert 1e-5 < max(differences) < 2e-2


def test_files_of_an_older_format_are_ignored(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(tmp_path / "model", "llama")
    cache = DocumentCache(folder=tmp_path / "documents")
    for module in (transformers_backend, openvino_backend):
        monkeypatch.setattr(module, "CACHE_FORMAT", 0)
    load(model, document_cache=cache).cache_prefixes([group.prefix for group in groups()])
    monkeypatch.undo()
    assert tokens_run(load(model, document_cache=cache), groups()) == all_tokens(groups())


def requests(count: int, tokens: int, questions: int = 1, length: int = 5) -> list[PromptGroup]:
    draw = np.random.default_rng(0)
    return [
        PromptGroup(
            prefix(draw.integers(3, VOCABULARY, tokens), 2, draw.integers(3, VOCABULARY, 3)),
            [draw.integers(3, VOCABULARY, length) for _ in range(questions)],
        )
        for _ in range(count)
    ]


def test_a_list_larger_than_memory_uses_what_is_in_memory(load: Load, tmp_path: Path) -> None:
    backend = load(tiny(tmp_path, "llama"), document_cache=DocumentCache(memory_bytes=100_000))
    documents = requests(20, 30)
    new = tokens_run(backend, documents)
    cached = backend.stats.prefixes_cached
    assert 5 < cached < 20
    for _ in range(2):
        assert tokens_run(backend, documents) == new - cached * 33


@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_many_questions_are_divided_among_passes(
    load: Load, memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their attention takes memory by the square of their tokens."""
    monkeypatch.setattr(backend_module, "MAX_QUESTION_TOKENS", 12)
    backend = load(tiny(tmp_path, "llama"), document_cache=DocumentCache(memory_bytes=memory))
    ran: list[int] = []
    forward = backend._forward

    def recorded(runs: Sequence[PrefixRun], keep: bool) -> Any:
        ran.extend(sum(map(len, run.questions)) for run in runs)
        return forward(runs, keep)

    backend._forward = recorded
    (group,) = requests(1, 30, questions=7)
    computed = masses(backend, [group])
    assert max(ran) <= 12 + len(group.prefix.baseline)
    assert len(computed) == 8
    for question, mass in zip(group.questions, computed[1:], strict=True):
        assert_close(masses(backend, [PromptGroup(group.prefix, [question])])[1:], [mass])


def test_rows_of_a_pass_are_alike(load: Load, tmp_path: Path) -> None:
    """All are padded to the longest, so a document of two lists must not double the others."""
    backend = load(tiny(tmp_path, "llama"))
    once, twice = requests(6, 30), requests(6, 30, questions=2)
    asked = [*once, *twice]
    passes: list[set[int]] = []
    forward = backend._forward

    def recorded(runs: Sequence[PrefixRun], keep: bool) -> Any:
        passes.append({run.tokens for run in runs})
        return forward(runs, keep)

    new = masses(backend, asked)
    backend._forward = recorded
    cached = masses(backend, asked)
    assert max(map(len, passes)) == 1
    assert_close(cached, new)


def test_files_are_read_while_another_call_uses_the_model(load: Load, tmp_path: Path) -> None:
    model = tiny(tmp_path / "model", "llama")
    cache = DocumentCache(folder=tmp_path / "documents")
    first, second = requests(2, 30)
    load(model, document_cache=cache).cache_prefixes([first.prefix])
    backend = load(model, document_cache=cache)
    read = backend._cache._store.get
    reading, go_on = threading.Event(), threading.Event()

    def slow(key: bytes) -> bytes | None:
        reading.set()
        assert key != first.prefix.key or go_on.wait(60)
        return read(key)

    backend._cache._store.get = slow  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(backend.attention_mass, [first])
        assert reading.wait(60)
        backend.attention_mass([second])
        assert not waiting.done()
        go_on.set()
        waiting.result(60)


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma3"])
@pytest.mark.parametrize("dtype", ["float32", "half"])
def test_documents_are_cached_on_disk(load: Load, family: str, dtype: str, tmp_path: Path) -> None:
    model = tiny(tmp_path / "model", family)
    if dtype == "half":
        dtype = "bfloat16" if isinstance(load(model), TransformersBackend) else "int8"
    plain = masses(load(model, dtype=dtype), groups())
    cache = DocumentCache(folder=tmp_path / "documents")
    prefixes = [group.prefix for group in groups()]
    first = load(model, dtype=dtype, document_cache=cache)
    assert first.cache_prefixes(prefixes) > 0
    assert first.cache_prefixes(prefixes) == 0, "they are on disk already"
    for memory in (0, 1 << 30):
        cache = cache.model_copy(update={"memory_bytes": memory})
        later = load(model, dtype=dtype, document_cache=cache)
        assert tokens_run(later, groups()) == question_tokens(groups()), "N/A is on disk too"
        assert_close(masses(later, groups()), plain, TOLERANCES[dtype])


def test_documents_in_memory_are_written_without_a_pass(load: Load, tmp_path: Path) -> None:
    model = tiny(tmp_path / "model", "llama")
    cache = DocumentCache(folder=tmp_path / "documents")
    backend = load(model, document_cache=cache)
    backend.attention_mass(groups())
    ran = backend.stats.tokens_run
    assert backend.cache_prefixes([group.prefix for group in groups()]) > 0
    assert backend.stats.tokens_run == ran
    later = load(model, document_cache=cache)
    assert tokens_run(later, groups()) == question_tokens(groups())


def test_another_model_never_uses_the_cache(load: Load, tmp_path: Path) -> None:
    model = tiny(tmp_path / "model", "llama")
    cache = DocumentCache(folder=tmp_path / "documents")
    requests = groups()[:1]
    everything = all_tokens(requests)
    load(model, document_cache=cache).cache_prefixes([requests[0].prefix])

    def ran(heads: HeadSet = HEADS, dtype: str = "float32") -> int:
        return tokens_run(load(model, heads, dtype=dtype, document_cache=cache), requests)

    assert ran() < everything
    other = "bfloat16" if isinstance(load(model), TransformersBackend) else "int8"
    assert ran(dtype=other) == everything
    assert ran(HeadSet.from_pairs([(0, 1), (3, 2)])) == everything
    reweighted = [head.model_copy(update={"weight": 9.0}) for head in HEADS.heads]
    assert ran(HEADS.model_copy(update={"heads": tuple(reweighted)})) < everything
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(model.path)
    AutoModelForCausalLM.from_config(config).save_pretrained(model.path)
    assert ran() == everything


def test_backends_do_not_share_files(tmp_path: Path) -> None:
    model = tiny(tmp_path / "model", "llama")
    cache = DocumentCache(folder=tmp_path / "documents")
    requests = groups()[:1]
    for backend in (TransformersBackend, OpenVINOBackend):
        loaded = backend(model, HEADS, dtype="float32", document_cache=cache)
        assert tokens_run(loaded, requests) == all_tokens(requests)
        assert loaded.cache_prefixes([requests[0].prefix]) > 0


def test_a_disk_cache_that_is_too_small_warns_and_stays_right(load: Load, tmp_path: Path) -> None:
    model = tiny(tmp_path / "model", "llama")
    plain = masses(load(model), groups())
    prefixes = [group.prefix for group in groups()]
    large = DocumentCache(folder=tmp_path / "large")
    written = load(model, document_cache=large).cache_prefixes(prefixes)
    small = DocumentCache(folder=tmp_path / "small", disk_bytes=written * 3 // 4, memory_bytes=0)
    backend = load(model, document_cache=small)
    with pytest.warns(UserWarning, match=r"cached documents were dropped.*disk_bytes"):
        backend.cache_prefixes(prefixes)
    assert_close(masses(backend, groups()), plain)
    tiny_cache = DocumentCache(folder=tmp_path / "tiny", disk_bytes=100)
    with pytest.raises(StorageError, match="raise DocumentCache"):
        load(model, document_cache=tiny_cache).cache_prefixes(prefixes)
    (tmp_path / "file").touch()
    no_folder = DocumentCache(folder=tmp_path / "file")
    with pytest.raises(StorageError, match="cannot write"):
        load(model, document_cache=no_folder).cache_prefixes(prefixes)
    nothing = DocumentCache(memory_bytes=0, disk_bytes=0)
    with pytest.raises(InvalidInputError, match="no room for documents"):
        load(model, document_cache=nothing).cache_prefixes(prefixes)


def test_closed(load: Load, tmp_path: Path) -> None:
    backend = load(tiny(tmp_path, "llama"))
    backend.close()
    with pytest.raises(ClosedError):
        backend.attention_mass(groups())
