"""OpenVINO's attention mass on tiny random models, against Transformers' eager attention."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import transformers
from support.tiny_models import HEADS, TINY, expected, prompts, saved, tiny

from core_rerank_integrations import HeadSet
from core_rerank_integrations.backends.openvino import backend as backend_module
from core_rerank_integrations.backends.openvino.backend import OpenVINOBackend
from core_rerank_integrations.errors import (
    InvalidInputError,
    ModelError,
    UnsupportedModelError,
)
from core_rerank_integrations.backends.loading import chosen_backend, load_backend
from core_rerank_integrations.models.resolve import LocalModel

KNOWN = [
    "llama",
    "llama-3-rope",
    "mistral",
    "mistral-sliding",
    "qwen2",
    "qwen2-sliding",
    "qwen3",
    "granite",
    "gemma3",
]
HAS_BFLOAT16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.mark.parametrize("longest_opening", [1024, 25])
@pytest.mark.parametrize("family", KNOWN)
def test_attention_mass(
    family: str, longest_opening: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of new documents and known ones, in one piece and read piece by piece."""
    monkeypatch.setattr(backend_module, "LONGEST_OPENING", longest_opening)
    model = tiny(tmp_path, family)
    backend = OpenVINOBackend(model, HEADS, dtype="float32")
    for _ in ("new documents", "known documents"):
        for prompt, mass in zip(prompts(), backend.attention_mass(prompts()), strict=True):
            assert mass.dtype == np.float32
            np.testing.assert_allclose(mass, expected(model, prompt), rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
        {"num_key_value_heads": 4, "head_dim": 6},
        {"num_key_value_heads": 1, "dtype": "float16"},
    ],
)
def test_what_llamas_differ_in(changes: dict[str, Any], tmp_path: Path) -> None:
    model = saved(tmp_path, transformers.LlamaConfig(**{**TINY, **changes}))
    backend = OpenVINOBackend(model, HEADS, dtype="float32")
    for prompt, mass in zip(prompts(), backend.attention_mass(prompts()), strict=True):
        np.testing.assert_allclose(mass, expected(model, prompt), rtol=0, atol=3e-6)


def test_heads_keep_the_order_of_their_set(tmp_path: Path) -> None:
    model = tiny(tmp_path, "llama")
    pairs = [(3, 2), (0, 1), (2, 3), (2, 0)]
    of_all = OpenVINOBackend(model, HeadSet.from_pairs(pairs), dtype="float32").head_mass(prompts())
    for place, pair in enumerate(pairs):
        one = OpenVINOBackend(model, HeadSet.from_pairs([pair]), dtype="float32")
        for mass, alone in zip(of_all, one.head_mass(prompts()), strict=True):
            np.testing.assert_allclose(mass[place], alone[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_less_precision_stays_close(dtype: str, tmp_path: Path) -> None:
    if dtype == "bfloat16" and not HAS_BFLOAT16:
        pytest.skip("this processor has no bfloat16")
    model = tiny(tmp_path, "qwen3")
    backend = OpenVINOBackend(model, HEADS, dtype=dtype)
    differs = False
    for prompt, mass in zip(prompts(), backend.attention_mass(prompts()), strict=True):
        assert mass.dtype == np.float32
        np.testing.assert_allclose(mass, expected(model, prompt), rtol=0, atol=5e-2)
        differs |= not np.allclose(mass, expected(model, prompt), rtol=0, atol=1e-6)
    assert differs, "it is float32"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Phi3Config", {}, "not 'phi3'"),
        ("Gemma2Config", {"head_dim": 8}, "not 'gemma2'"),
        (
            "LlamaConfig",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "RoPE of type 'dynamic'",
        ),
        ("LlamaConfig", {"hidden_act": "relu"}, "no activation 'relu'"),
    ],
)
def test_what_it_does_not_know_is_refused_by_name(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = saved(tmp_path, getattr(transformers, name)(**{**TINY, **changes}))
    with pytest.raises(UnsupportedModelError, match=message):
        OpenVINOBackend(model, HEADS)
    assert chosen_backend("auto", model, HEADS) == "transformers"


def test_which_backend_is_taken_where_none_is_named(tmp_path: Path) -> None:
    model = tiny(tmp_path, "llama")
    assert chosen_backend("auto", model, HEADS, device="cpu") == "openvino"
    assert chosen_backend("auto", model, HEADS, device="cuda") == "transformers"
    assert chosen_backend("auto", model, HEADS, dtype="float16") == "transformers"
    assert chosen_backend("vllm", model, HEADS) == "vllm"
    with pytest.raises(InvalidInputError, match="on the CPU, not on 'cuda'"):
        load_backend("openvino", model, HEADS, "auto", device="cuda")
    (tmp_path / "model.safetensors").rename(tmp_path / "model.bin")
    assert chosen_backend("auto", model, HEADS, device="cpu") == "transformers"


def test_wrong_dtype_and_missing_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny(tmp_path, "llama")
    with pytest.raises(InvalidInputError, match=r"dtype must be 'auto' or.*int8, got 'float16'"):
        OpenVINOBackend(model, HEADS, dtype="float16")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks the weights .*layers\.1\.self_attn\.q_proj"):
        OpenVINOBackend(model, HEADS)


def test_pytorch_is_not_needed(smollm2: LocalModel) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from core_rerank_integrations import CoReReranker\n"
        f"reranker = CoReReranker({str(smollm2.path)!r}, 'fit-smollm2-135m-instruct')\n"
        "documents = ['Bread is baked from flour.', 'Bell patented the telephone in 1876.']\n"
        "print(reranker, reranker.rerank('Who patented the telephone?', documents)[0].index)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "backend='openvino') 1" in result.stdout
    assert "PyTorch" not in result.stderr
