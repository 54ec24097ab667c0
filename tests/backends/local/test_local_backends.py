"""What the backends of this process share, on each of them: documents that were read are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_models import HEADS, VOCABULARY, prompts, tiny
from transformers import AutoConfig, AutoModelForCausalLM

from core_rerank_integrations import DocumentCache, HeadSet
from core_rerank_integrations.backends.local.backend import LocalBackend
from core_rerank_integrations.backends.openvino.backend import OpenVINOBackend
from core_rerank_integrations.backends.transformers.backend import TransformersBackend
from core_rerank_integrations.errors import ClosedError, StorageError
from core_rerank_integrations.models.resolve import LocalModel
from core_rerank_integrations.method.prompt import Prompt, Span
from core_rerank_integrations.method.scoring import Mass

Load = Callable[..., LocalBackend]
TOLERANCES = {"float32": 1e-6, "bfloat16": 1e-2, "int8": 5e-2}


@pytest.fixture(params=[TransformersBackend, OpenVINOBackend], ids=["transformers", "openvino"])
def load(request: pytest.FixtureRequest) -> Load:
    def loaded(model: LocalModel, heads: HeadSet = HEADS, **settings: Any) -> LocalBackend:
        backend: LocalBackend = request.param(model, heads, **{"dtype": "float32", **settings})
        return backend

    return loaded


def assert_close(masses: Sequence[Mass], others: Sequence[Mass], tolerance: float = 1e-6) -> None:
    for mass, other in zip(masses, others, strict=True):
        np.testing.assert_allclose(mass, other, rtol=0, atol=tolerance)


def counted(backend: Any, asked: list[Prompt]) -> tuple[list[Mass], int]:
    """Masses, and how many tokens the model ran for them."""
    ran: list[int] = []
    if isinstance(backend, TransformersBackend):
        hook = backend._model.layers[0].register_forward_hook(
            lambda _, arguments, __: ran.append(arguments[0].shape[1])
        )
        masses = backend.attention_mass(asked)
        hook.remove()
        return masses, sum(ran)
    run = backend._run
    backend._run = lambda rows: (ran.extend(row.new_tokens for row in rows), run(rows))[1]
    masses = backend.attention_mass(asked)
    backend._run = run
    return masses, sum(ran)


def of_questions(asked: Sequence[Prompt]) -> int:
    return sum(len(prompt.suffix) - prompt.instruction for prompt in asked)


def test_of_known_documents_the_question_runs_alone(load: Load, tmp_path: Path) -> None:
    backend = load(tiny(tmp_path, "llama"))
    first, alone, second, *_ = prompts()
    (expected_mass,), ran = counted(backend, [second])
    assert ran == len(second)
    assert counted(backend, [first])[1] == of_questions([first])
    assert counted(backend, [alone, second])[1] == len(alone) + of_questions([second])
    assert_close(backend.attention_mass([second]), [expected_mass])
    backend.clear_cache()
    assert counted(backend, [second])[1] == len(second), "read anew"


def test_batches_do_not_follow_the_order_of_documents(load: Load, tmp_path: Path) -> None:
    """So neither does what rounding does to a score."""
    backend = load(tiny(tmp_path, "llama"))
    draw = np.random.default_rng(0)
    asked = [
        Prompt(draw.integers(3, VOCABULARY, 20), draw.integers(3, VOCABULARY, 5), (Span(0, 1),))
        for _ in range(6)
    ]
    passes: list[list[bytes]] = []
    forward = backend._forward

    def noting(groups: Any, keep: bool) -> Any:
        passes.append([group.key for group in groups])
        return forward(groups, keep)

    backend._forward = noting
    backend.attention_mass(asked)
    backend.clear_cache()
    backend.attention_mass(asked[::-1])
    half = len(passes) // 2
    assert passes[:half] == passes[half:]
    assert len({key for keys in passes for key in keys}) > 1


def test_the_memory_of_known_documents_is_bounded(load: Load, tmp_path: Path) -> None:
    model = tiny(tmp_path, "llama")
    expected_masses = load(model).attention_mass(prompts())
    sizes = []
    for limit in (0, 40_000, 1 << 30):
        backend = load(model, document_cache=DocumentCache(memory_bytes=limit))
        for _ in range(2):
            assert_close(backend.attention_mass(prompts()), expected_masses)
        sizes.append((len(backend._known), backend._known.size))
    assert sizes[0] == (0, 0)
    assert sizes[1][0] in (1, 2)
    assert sizes[1][1] <= 40_000
    tokens = (40 + 3) + 17 + (90 + 6)
    keys_and_values = (4 + 3) * 2 * 8 * 4  # Layers, key heads, head size, bytes.
    assert sizes[2] == (3, tokens * (keys_and_values + len(HEADS.heads) * 4))


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma3"])
@pytest.mark.parametrize("dtype", ["float32", "half"])
def test_remembered_documents_come_from_disk(
    load: Load, family: str, dtype: str, tmp_path: Path
) -> None:
    model = tiny(tmp_path / "model", family)
    if dtype == "half":
        dtype = "bfloat16" if isinstance(load(model), TransformersBackend) else "int8"
    others = [
        replace(prompt, suffix=np.append(prompt.suffix[: prompt.instruction], [7, 9, 11]))
        for prompt in prompts()[:2]
    ]
    plain = load(model, dtype=dtype).attention_mass(prompts())
    plain_others = load(model, dtype=dtype).attention_mass(others)
    cache = DocumentCache(folder=tmp_path / "documents")
    assert load(model, dtype=dtype, document_cache=cache).cache_documents(prompts())
    for memory in (0, 1 << 30):
        cache = cache.model_copy(update={"memory_bytes": memory})
        later = load(model, dtype=dtype, document_cache=cache)
        for asked, expected_masses, expected_run in (
            (prompts(), plain, 0),
            (others, plain_others, of_questions(others)),
        ):
            masses, ran = counted(later, asked)
            assert ran == expected_run, "what was asked when it was remembered has its answer"
            assert_close(masses, expected_masses, TOLERANCES[dtype])


def test_another_model_is_never_answered_from_what_is_kept(load: Load, tmp_path: Path) -> None:
    model = tiny(tmp_path / "model", "llama")
    cache = DocumentCache(folder=tmp_path / "documents")
    asked = prompts()[:1]
    everything = len(asked[0])
    load(model, document_cache=cache).cache_documents(asked)

    def ran(heads: HeadSet = HEADS, dtype: str = "float32") -> int:
        return counted(load(model, heads, dtype=dtype, document_cache=cache), asked)[1]

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


def test_backends_do_not_answer_for_each_other(tmp_path: Path) -> None:
    model = tiny(tmp_path / "model", "llama")
    cache = DocumentCache(folder=tmp_path / "documents")
    asked = prompts()[:1]
    for backend in (TransformersBackend, OpenVINOBackend):
        loaded = backend(model, HEADS, dtype="float32", document_cache=cache)
        assert counted(loaded, asked)[1] == len(asked[0])
        assert loaded.cache_documents(asked) > 0


def test_a_store_too_small_says_so_and_gives_right_scores(load: Load, tmp_path: Path) -> None:
    model = tiny(tmp_path / "model", "llama")
    plain = load(model).attention_mass(prompts())
    sizes = load(model, document_cache=DocumentCache(folder=tmp_path / "large")).cache_documents(
        prompts()
    )
    small = DocumentCache(folder=tmp_path / "small", disk_bytes=sizes * 3 // 4, memory_bytes=0)
    backend = load(model, document_cache=small)
    with pytest.warns(UserWarning, match=r"remembered documents were dropped.*disk_bytes"):
        backend.cache_documents(prompts())
    assert_close(backend.attention_mass(prompts()), plain)
    tiny_store = DocumentCache(folder=tmp_path / "tiny", disk_bytes=100)
    with pytest.raises(StorageError, match="raise DocumentCache"):
        load(model, document_cache=tiny_store).cache_documents(prompts())
    (tmp_path / "file").touch()
    no_folder = DocumentCache(folder=tmp_path / "file")
    with pytest.raises(StorageError, match="cannot write"):
        load(model, document_cache=no_folder).cache_documents(prompts())


def test_closed(load: Load, tmp_path: Path) -> None:
    backend = load(tiny(tmp_path, "llama"))
    backend.close()
    with pytest.raises(ClosedError):
        backend.attention_mass(prompts())
