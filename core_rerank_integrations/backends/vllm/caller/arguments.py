"""What an engine of ours is started with: our defaults, the caller's arguments, what is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from core_rerank_integrations.errors import InvalidInputError, requires_extra
from core_rerank_integrations.models.resolve import LocalModel

with requires_extra("vllm"):
    from safetensors import safe_open
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

CPU_BLOCK_SIZE = 32
"""vLLM's own on CPU is 128, in which a short document never fills a block that could be shared."""

REFUSED_PARALLELISM = {
    "pipeline_parallel_size": "pipeline parallelism; use tensor_parallel_size",
    "decode_context_parallel_size": "context parallelism; use tensor_parallel_size",
    "prefill_context_parallel_size": "context parallelism; use tensor_parallel_size",
    "data_parallel_size": "data parallelism, where a question and its N/A prompt may reach "
    "engines that do not share a cache; make a reranker for each GPU",
}

HALF_PRECISION = ("auto", "half", "float16", "bfloat16")
"""Names of the types FlashAttention computes in; ``auto`` is never float32 in vLLM."""
PLAIN_TYPES = ("F64", "F32", "F16", "BF16")
"""Types of weights that are loaded as what the model computes in; others stay as they are."""
FLASH_ATTENTION_CAPABILITY = (8, 0)
"""Compute capability of the first GPUs with FlashAttention, Ampere."""
FLASH_ATTENTION_HEAD_SIZE = 256

GPU_MEMORY_SHARE = 0.5
"""Of the GPU's memory, where the weights leave enough of it for all else."""
MOST_GPU_MEMORY = 0.92
"""vLLM's own default: the rest is for what lies outside of its count."""
WORKING_BYTES = 4 * 1024**3
"""Planned beside the weights: activations of a step, graphs, and a small cache."""


def engine_arguments(
    given: Mapping[str, Any], *, own: Mapping[str, Any], fixed: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of an engine of ours: our defaults, the caller's, and what cannot be changed.

    Raises:
        InvalidInputError: One is unknown to vLLM, or asks for what is not supported.
    """
    for name in REFUSED_PARALLELISM:
        refuse_parallelism(name, given.get(name, 1))
    if "fp8" in str(given.get("kv_cache_dtype", "auto")):
        raise InvalidInputError(
            f"kv_cache_dtype={given['kv_cache_dtype']!r}: reranking reads keys in full precision; "
            'leave it at "auto", or set "bfloat16" for a checkpoint with FP8 scales'
        )
    if unknown := set(given) - set(AsyncEngineArgs.__dataclass_fields__):
        raise InvalidInputError(f"vLLM has no engine argument {', '.join(sorted(unknown))}")
    if reserved := {name for name in fixed if name in given and name != "hf_overrides"}:
        raise InvalidInputError(
            f"engine_args cannot set {', '.join(sorted(reserved))}: this package does"
        )
    return {
        "gpu_memory_utilization": GPU_MEMORY_SHARE,
        "enable_prefix_caching": True,
        "block_size": CPU_BLOCK_SIZE if current_platform.is_cpu() else None,
        "disable_log_stats": True,
        **own,
        **given,
        **fixed,
    }


def refuse_parallelism(name: str, size: int) -> None:
    """Refuse what an engine's parallel ranks cannot answer together.

    Raises:
        InvalidInputError: Names the setting, and what to do instead.
    """
    if size not in (None, 1):
        raise InvalidInputError(
            f"{name}={size!r}: reranking does not support {REFUSED_PARALLELISM[name]}"
        )


def cuda_arguments(
    model: LocalModel, dtype: str, given: Mapping[str, Any], num_layers: int | None = None
) -> dict[str, Any]:
    """Defaults that depend on the GPU at hand; none without CUDA.

    Args:
        model: The model's folder.
        dtype: As the caller named it.
        given: The caller's engine arguments, which go before these.
        num_layers: How many of its layers are loaded; ``None`` for all.

    Raises:
        InvalidInputError: The weights do not fit into the GPU's memory.
    """
    if not current_platform.is_cuda():
        return {}
    dtype = str(given.get("dtype", dtype)).removeprefix("torch.")
    chosen: dict[str, Any] = {}
    if not {"attention_backend", "attention_config"} & set(given):
        capability = current_platform.get_device_capability()
        chosen["attention_backend"] = attention_backend(
            tuple(capability or (0, 0)), dtype, head_size(model.config())
        )
    # What these make of the weights is vLLM's to know.
    if not {"gpu_memory_utilization", "quantization", "cpu_offload_gb"} & set(given):
        weights = weights_of(model.path, dtype, num_layers)
        if weights is not None:
            ranks = given.get("tensor_parallel_size", 1)
            total = current_platform.get_device_total_memory()
            chosen["gpu_memory_utilization"] = memory_share(weights, ranks, total)
    return chosen


def attention_backend(capability: tuple[int, ...], dtype: str, head_size: int) -> str:
    """The attention backend whose cache this package reads, and that this GPU has.

    vLLM's own choice is FlashInfer on data-centre Blackwell, and differs with the precision.

    Args:
        capability: The GPU's compute capability.
        dtype: What the model computes in, as vLLM names it.
        head_size: Of its attention heads.
    """
    flash = (
        capability >= FLASH_ATTENTION_CAPABILITY
        and dtype in HALF_PRECISION
        and head_size <= FLASH_ATTENTION_HEAD_SIZE
        and head_size % 8 == 0
    )
    return "FLASH_ATTN" if flash else "TRITON_ATTN"


def head_size(config: Any) -> int:
    """The largest of a model's attention heads."""
    plain = config.hidden_size // config.num_attention_heads
    sizes = (getattr(config, name, None) for name in ("head_dim", "global_head_dim"))
    largest: int = max(size or plain for size in sizes)
    return largest


def memory_share(weights: int, ranks: int, total: int) -> float:
    """How much of each GPU's memory to ask for.

    Args:
        weights: Bytes of the weights, over all GPUs.
        ranks: Over how many GPUs they are spread.
        total: Bytes of a GPU's memory.

    Raises:
        InvalidInputError: It does not suffice.
    """
    needed = weights / ranks + WORKING_BYTES
    if needed > MOST_GPU_MEMORY * total:
        gib = 1024**3
        raise InvalidInputError(
            f"the model's layers up to the highest head take {weights / gib:.1f} GiB on {ranks} "
            f"GPU, and need about {WORKING_BYTES / gib:.0f} GiB beside, but a GPU here has "
            f"{total / gib:.1f} GiB: spread it over several with "
            'engine_args={"tensor_parallel_size": 2}, or take a smaller model'
        )
    return max(GPU_MEMORY_SHARE, round(needed / total, 3))


def weights_of(folder: Path, dtype: str, num_layers: int | None = None) -> int | None:
    """Bytes of a model's weights once loaded, from its files' headers; ``None`` if it has none.

    Args:
        folder: The model's.
        dtype: What it is loaded in, as vLLM names it.
        num_layers: How many of its layers are loaded; ``None`` for all.
    """
    loaded = 2 if dtype in HALF_PRECISION else 4
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  It is no mapping.
                layer = re.search(r"\blayers\.(\d+)\.", name)
                if layer is None or num_layers is None or int(layer[1]) < num_layers:
                    values = file.get_slice(name)
                    stored = values.get_dtype()
                    width = loaded if stored in PLAIN_TYPES else _stored_bytes(stored)
                    total += prod(values.get_shape()) * width
    return total or None


def _stored_bytes(dtype: str) -> int:
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) // 8 if bits else 1
