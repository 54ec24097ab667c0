"""Attention mass on tiny random models of every family, against Transformers' eager attention."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.tiny_models import (
    FAMILIES,
    HEADS,
    SLIDING,
    TINY,
    VOCABULARY,
    assert_close,
    expected_masses,
    groups,
    masses,
    saved,
    tiny,
)

from core_rerank_integrations import CoReReranker, HeadSet
from core_rerank_integrations.backends.transformers.backend import TransformersBackend
from core_rerank_integrations.errors import (
    InvalidInputError,
    ModelError,
    UnsupportedModelError,
)
from core_rerank_integrations.models.local_model import LocalModel


def reading(model: LocalModel, heads: HeadSet = HEADS, **settings: Any) -> TransformersBackend:
    return TransformersBackend(model, heads, **{"dtype": "float32", **settings})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_batch_tokens", [1, 8192])
def test_attention_mass(family: str, max_batch_tokens: int, tmp_path: Path) -> None:
    model = tiny(tmp_path, family)
    backend = reading(model, max_batch_tokens=max_batch_tokens)
    for _ in ("new documents", "cached documents"):
        computed = masses(backend, groups())
        assert {mass.dtype for mass in computed} == {np.dtype(np.float32)}
        assert_close(computed, expected_masses(model, groups()), 2e-6)


def test_another_thread_that_loads_a_model_changes_nothing(tmp_path: Path) -> None:
    """Transformers sets PyTorch's default dtype meanwhile, for all threads."""
    model = tiny(tmp_path, "llama")
    backend = reading(model)
    torch.set_default_dtype(torch.bfloat16)
    try:
        computed = masses(backend, groups())
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(computed, expected_masses(model, groups()), 2e-6)


FORK = """
import os, pickle, sys
from pathlib import Path
import numpy as np
import torch
from core_rerank_integrations.backends.transformers.backend import TransformersBackend
from core_rerank_integrations.errors import BackendError
from core_rerank_integrations.models.local_model import LocalModel

model = LocalModel(Path(sys.argv[1]), None)
heads, groups = pickle.loads(sys.stdin.buffer.read())

def masses():
    backend = TransformersBackend(model, heads, dtype="float32")
    return [mass for group in backend.attention_mass(groups) for mass in group.questions]

torch.set_num_threads(2)
expected = masses()
child = os.fork()
if child == 0:
    try:
        masses()
    except BackendError as error:
        print(error, flush=True)
    torch.set_num_threads(1)
    same = map(np.allclose, masses(), expected)
    os._exit(0 if all(same) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_fork_cannot_use_the_threads_of_its_parent(tmp_path: Path) -> None:
    """It would wait for them forever; with one thread it needs none."""
    tiny(tmp_path, "llama")
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK, tmp_path],
        input=pickle.dumps((HEADS, groups())),
        capture_output=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr.decode()
    assert re.search(r"forked from process \d+.*'spawn'.*set_num_threads", result.stdout.decode())


def test_layers_above_the_highest_head_are_not_built(tmp_path: Path) -> None:
    backend = reading(tiny(tmp_path, "llama"))
    assert backend._model.config.num_hidden_layers == 4
    assert len(backend._model.layers) == 4
    names = [name for name, _ in backend._model.named_parameters()]
    assert not any("lm_head" in name or "layers.4" in name for name in names)


def test_nothing_runs_after_the_last_queries_and_keys(tmp_path: Path) -> None:
    backend = reading(tiny(tmp_path, "llama"))
    ran = []
    for name, module in backend._model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    backend.attention_mass(groups()[:1])
    assert "layers.3.self_attn.k_proj" in ran
    assert "layers.2.mlp" in ran
    assert not {"layers.3.self_attn.o_proj", "layers.3.mlp", "norm"} & set(ran)


def test_embeddings_of_all_layers_in_one_matrix_cannot_be_cut(tmp_path: Path) -> None:
    name, changes = FAMILIES["gemma4"]
    changes = {**TINY, **changes, "hidden_size_per_layer_input": 8}
    config = getattr(transformers, name)(**changes, vocab_size_per_layer_input=VOCABULARY)
    model = saved(tmp_path, config)
    with pytest.raises(UnsupportedModelError, match=r"gemma4_text.*in one matrix"):
        reading(model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close(dtype: str, tmp_path: Path) -> None:
    model = tiny(tmp_path, "qwen3")
    backend = TransformersBackend(model, HEADS, dtype=dtype)
    assert next(backend._model.parameters()).dtype == getattr(torch, dtype)
    computed = masses(backend, groups())
    assert {mass.dtype for mass in computed} == {np.dtype(np.float32)}
    assert_close(computed, expected_masses(model, groups()), 5e-2)


def test_one_model_serves_two_head_sets(tmp_path: Path) -> None:
    """No global state belongs to the first."""
    model = tiny(tmp_path, "llama")
    other = HeadSet.from_pairs([(1, 1)])
    first, second = reading(model), reading(model, other)
    before = masses(first, groups())
    second.attention_mass(groups())
    assert_close(masses(first, groups()), before)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Gemma2Config", {"head_dim": 8}, "soft-caps its attention logits"),
        (
            "GptOssConfig",
            {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, **SLIDING},
            "attention sinks",
        ),
        ("BloomConfig", {"n_layer": 5, "n_head": 4}, "AttentionInterface"),
        (
            "Qwen3NextConfig",
            {"head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1},
            "linear_attention",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = saved(tmp_path, getattr(transformers, name)(**{**TINY, **changes}))
    with pytest.raises(UnsupportedModelError, match=message):
        reading(model)


@pytest.mark.model
def test_the_default_passes_the_comparison_in_bfloat16() -> None:
    with CoReReranker(backend="transformers", dtype="bfloat16") as reranker:
        results = reranker.rerank("Who patented the telephone?", ["Soup is hot.", "Bell did."])
    assert results[0].index == 1


def test_attention_of_another_kind_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose attention is not what the interface says: the load-time comparison."""
    from transformers.models.llama import modeling_llama

    eager = modeling_llama.eager_attention_forward

    def hotter(*arguments: Any, scaling: float, **kwargs: Any) -> Any:
        return eager(*arguments, scaling=2 * scaling, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", hotter)
    with pytest.raises(UnsupportedModelError, match="differs from the model's own"):
        reading(tiny(tmp_path, "llama"))


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny(tmp_path, "llama")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.q_proj"):
        reading(model)


@pytest.mark.parametrize("has_it", [True, False])
def test_auto_is_bfloat16_where_the_processor_has_it(
    has_it: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: has_it)
    backend = TransformersBackend(tiny(tmp_path, "llama"), HEADS, device="cpu")
    assert backend.dtype == (torch.bfloat16 if has_it else torch.float32)


def test_unknown_dtype(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"dtype must be 'auto' or one of .* got 'int8'"):
        TransformersBackend(tiny(tmp_path, "llama"), HEADS, dtype="int8")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_equals_cpu(family: str, tmp_path: Path) -> None:
    model = tiny(tmp_path, family)
    cpu = TransformersBackend(model, HEADS, device="cpu", dtype="float32")
    cuda = TransformersBackend(model, HEADS, device="cuda", dtype="float32")
    assert_close(masses(cuda, groups()), masses(cpu, groups()), 2e-5)
