"""OpenVINO's attention mass on tiny random models, against Transformers' eager attention."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from support.tiny_models import (
    HEADS,
    TINY,
    assert_close,
    expected_masses,
    groups,
    masses,
    prefix,
    saved,
    tiny,
)

from core_rerank_integrations import HeadSet
from core_rerank_integrations.backends.base import PromptGroup
from core_rerank_integrations.backends.loading import chosen_backend, load_backend
from core_rerank_integrations.backends.openvino import backend as backend_module, self_test
from core_rerank_integrations.backends.openvino.backend import OpenVINOBackend
from core_rerank_integrations.backends.openvino.decoder import Decoder
from core_rerank_integrations.backends.openvino.runtime import openvino
from core_rerank_integrations.backends.openvino.self_test import check_attention
from core_rerank_integrations.backends.openvino.weights import Weights
from core_rerank_integrations.errors import (
    InvalidInputError,
    ModelError,
    UnsupportedModelError,
)
from core_rerank_integrations.models.local_model import LocalModel
from core_rerank_integrations.models.safetensors_files import StoredTensor
from core_rerank_integrations.settings import RerankerSettings

FAMILIES = [
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


@pytest.mark.parametrize("max_piece_tokens", [1024, 25])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_mass(
    family: str, max_piece_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New and cached documents, read at once and in pieces."""
    monkeypatch.setattr(backend_module, "MAX_PIECE_TOKENS", max_piece_tokens)
    model = tiny(tmp_path, family)
    backend = OpenVINOBackend(model, HEADS, dtype="float32")
    for _ in ("new documents", "cached documents"):
        computed = masses(backend, groups())
        assert {mass.dtype for mass in computed} == {np.dtype(np.float32)}
        assert_close(computed, expected_masses(model, groups()), 3e-6)


def test_a_long_question_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(tmp_path, "llama")
    draw = np.random.default_rng(0)
    group = PromptGroup(
        prefix(draw.integers(3, 97, 60), 4, draw.integers(3, 97, 3)),
        [draw.integers(3, 97, 300), draw.integers(3, 97, 8)],
    )
    monkeypatch.setattr(backend_module, "MAX_PIECE_TOKENS", 50)
    monkeypatch.setattr(backend_module, "MAX_LOGITS", 8000)
    backend = OpenVINOBackend(model, HEADS, dtype="float32")
    new: list[int] = []
    run = backend._run_rows

    def recorded(rows: Any) -> Any:
        new.append(max(row.new_tokens * (row.cached_tokens + row.new_tokens) for row in rows))
        return run(rows)

    monkeypatch.setattr(backend, "_run_rows", recorded)
    for _ in ("new document", "cached document"):
        assert_close(masses(backend, [group]), expected_masses(model, [group]), 3e-6)
    assert max(new) <= 8000


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
    assert_close(masses(backend, groups()), expected_masses(model, groups()), 3e-6)


def test_heads_keep_the_order_of_their_set(tmp_path: Path) -> None:
    model = tiny(tmp_path, "llama")
    pairs = [(3, 2), (0, 1), (2, 3), (2, 0)]
    together = OpenVINOBackend(model, HeadSet.from_pairs(pairs), dtype="float32")
    all_heads = [result.questions[0] for result in together.attention_mass(groups())]
    for index, pair in enumerate(pairs):
        backend = OpenVINOBackend(model, HeadSet.from_pairs([pair]), dtype="float32")
        one_head = [result.questions[0][0] for result in backend.attention_mass(groups())]
        assert_close([mass[index] for mass in all_heads], one_head)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_less_precision_stays_close(dtype: str, tmp_path: Path) -> None:
    if dtype == "bfloat16" and not HAS_BFLOAT16:
        pytest.skip("this processor has no bfloat16")
    model = tiny(tmp_path, "qwen3")
    backend = OpenVINOBackend(model, HEADS, dtype=dtype)
    computed, reference = masses(backend, groups()), expected_masses(model, groups())
    assert {mass.dtype for mass in computed} == {np.dtype(np.float32)}
    assert_close(computed, reference, 5e-2)
    differences = [
        np.abs(mass - other).max() for mass, other in zip(computed, reference, strict=True)
    ]
    assert max(differences) > 1e-6, "it is float32"


@pytest.mark.skipif(not HAS_BFLOAT16, reason="this processor has no bfloat16")
def test_scales_have_the_precision_in_which_they_are_multiplied(tmp_path: Path) -> None:
    """Otherwise new and cached keys would differ."""
    backend = OpenVINOBackend(tiny(tmp_path, "llama"), HEADS, dtype="bfloat16")
    backend.attention_mass(groups())
    for group in groups():
        cached = backend._cache.get(group.prefix.key)
        assert cached is not None
        codes, scales = cached.states
        assert codes.dtype == np.int8
        assert np.abs(codes.astype(int)).max() in (126, 127)
        assert not (scales.view(np.uint32) & 0xFFFF).any()


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
        ("LlamaConfig", {"quantization_config": {"quant_method": "awq"}}, "quantised checkpoint"),
    ],
)
def test_what_it_does_not_know_is_refused_by_name(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = saved(tmp_path, getattr(transformers, name)(**{**TINY, **changes}))
    with pytest.raises(UnsupportedModelError, match=message):
        OpenVINOBackend(model, HEADS)
    assert chosen_backend(RerankerSettings(), model, HEADS) == "transformers"


def test_the_backend_that_auto_selects(tmp_path: Path) -> None:
    model = tiny(tmp_path, "llama")

    def chosen(**settings: str) -> str:
        return chosen_backend(RerankerSettings(**settings), model, HEADS)

    assert chosen(device="cpu") == "openvino"
    assert chosen(device="cuda") == "transformers"
    assert chosen(dtype="float16") == "transformers"
    assert chosen(backend="vllm") == "vllm"
    with pytest.raises(InvalidInputError, match="on the CPU, not on 'cuda'"):
        load_backend("openvino", RerankerSettings(device="cuda"), model, HEADS)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.bin")
    assert chosen(device="cpu") == "transformers"


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_compared_with_the_models_own_once(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORE_RERANK_CACHE", str(tmp_path / "cache"))
    model = tiny(tmp_path / "model", family)
    check_attention(model, 4)
    monkeypatch.setattr(self_test, "_eager_mass", None)
    check_attention(model, 4)


def test_attention_that_differs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORE_RERANK_CACHE", str(tmp_path / "cache"))
    model = tiny(tmp_path / "model", "llama")
    read = Decoder.from_config
    monkeypatch.setattr(
        Decoder, "from_config", lambda *args: replace(read(*args), attention_scale=0.3)
    )
    for _ in ("first", "again"):
        with pytest.raises(UnsupportedModelError, match="use backend='transformers'"):
            load_backend("openvino", RerankerSettings(), model, HEADS)


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


def test_threads_are_as_many_as_wanted_and_run_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pinned to the first cores, as OpenVINO would, processes with few threads share these."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    backend = OpenVINOBackend(tiny(tmp_path, "llama"), HEADS)
    compiled = backend._request.get_compiled_model()
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert not compiled.get_property("ENABLE_CPU_PINNING")


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


def test_weights_are_not_copied_from_their_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []
    mapped = StoredTensor.mapped

    def spy(stored: StoredTensor) -> Any:
        read.append(mapped(stored))
        return read[-1]

    monkeypatch.setattr(StoredTensor, "mapped", spy)
    weights = Weights(saved(tmp_path, transformers.LlamaConfig(**TINY)).path)
    matrix = weights.matrix("layers.0.self_attn.q_proj.weight")
    for constant in (weights.table("embed_tokens.weight"), matrix.input_value(0).get_node()):
        assert any(np.shares_memory(constant.data, numbers) for numbers in read)
