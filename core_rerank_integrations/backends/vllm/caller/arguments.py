"""The arguments of a new engine: defaults, the user's arguments, and what is refused."""

from __future__ import annotations

import re
from argparse import SUPPRESS, ArgumentError
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from core_rerank_integrations.errors import InvalidInputError, requires_extra
from core_rerank_integrations.models.local_model import LocalModel

with requires_extra("vllm"):
    from safetensors import safe_open
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

CPU_BLOCK_SIZE = 32
"""vLLM's default on CPU is 128: a block that a short document does not fill, and cannot share."""

REFUSED_PARALLELISM = {
    "pipeline_parallel_size": "pipeline parallelism; use tensor_parallel_size",
    "decode_context_parallel_size": "context parallelism; use tensor_parallel_size",
    "prefill_context_parallel_size": "context parallelism; use tensor_parallel_size",
}

HALF_PRECISION = ("auto", "half", "float16", "bfloat16")
"""Names of the types that FlashAttention supports; ``auto`` is never float32 in vLLM."""
PLAIN_TYPES = ("F64", "F32", "F16", "BF16")
"""Types of weights that are converted to the model's type; other types are loaded as they are."""
FLASH_ATTENTION_CAPABILITY = (8, 0)
"""Lowest compute capability of GPUs with FlashAttention, Ampere."""
FLASH_ATTENTION_HEAD_SIZE = 256

GPU_MEMORY_SHARE = 0.5
"""Share of the GPU's memory that is requested, unless the weights need more."""
MAX_GPU_MEMORY_SHARE = 0.92
"""vLLM's own default. It does not count the memory above this share."""
WORKING_BYTES = 4 * 1024**3
"""Memory planned besides the weights: activations of a step, graphs, and a small cache."""


def engine_arguments(
    model: LocalModel, engine_args: Mapping[str, Any], num_layers: int | None = None, **fixed: Any
) -> dict[str, Any]:
    """Return the arguments of an engine: defaults, the user's, and those that are fixed.

    Args:
        model: Folder of the model.
        engine_args: The user's arguments, with ``dtype``.
        num_layers: Number of layers that are loaded; ``None`` for all.
        **fixed: Arguments that the user cannot set, except for ``hf_overrides``.

    Raises:
        InvalidInputError: A user's argument is unknown to vLLM, is fixed, or is not supported; or
            the weights do not fit into the GPU's memory.
    """
    fixed["model"] = str(model.path)
    refuse_parallelism(engine_args)
    if "fp8" in str(engine_args.get("kv_cache_dtype", "auto")):
        raise InvalidInputError(
            f"kv_cache_dtype={engine_args['kv_cache_dtype']!r}: reranking reads keys in full "
            'precision; leave it at "auto", or set "bfloat16" for a checkpoint with FP8 scales'
        )
    if unknown := set(engine_args) - set(AsyncEngineArgs.__dataclass_fields__):
        raise InvalidInputError(f"vLLM has no engine argument {', '.join(sorted(unknown))}")
    if reserved := (set(fixed) - {"hf_overrides"}) & set(engine_args):
        raise InvalidInputError(
            f"engine_args cannot set {', '.join(sorted(reserved))}: this package does"
        )
    return {
        "gpu_memory_utilization": GPU_MEMORY_SHARE,
        "enable_prefix_caching": True,
        "block_size": CPU_BLOCK_SIZE if current_platform.is_cpu() else None,
        "disable_log_stats": True,
        **cuda_arguments(model, engine_args, num_layers),
        **engine_args,
        **fixed,
    }


def parsed_arguments(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Parse arguments as the command ``vllm`` does.

    Returns:
        The engine's arguments among them, and those that are not of the engine.

    Raises:
        InvalidInputError: A value is invalid.
    """
    parser = FlexibleArgumentParser(add_help=False, exit_on_error=False)
    for action in AsyncEngineArgs.add_cli_args(parser)._actions:
        action.default = SUPPRESS  # Only what is given.
    try:
        parsed, others = parser.parse_known_args(list(arguments))
    except ArgumentError as error:
        raise InvalidInputError(f"vLLM's {error}") from error
    return vars(parsed), others


def refuse_parallelism(settings: Mapping[str, Any]) -> None:
    """Check the kinds of parallelism of an engine.

    Raises:
        InvalidInputError: One of `REFUSED_PARALLELISM` is above 1.
    """
    for name, reason in REFUSED_PARALLELISM.items():
        if (size := settings.get(name)) not in (None, 1):
            raise InvalidInputError(f"{name}={size!r}: reranking does not support {reason}")


def cuda_arguments(
    model: LocalModel, engine_args: Mapping[str, Any], num_layers: int | None = None
) -> dict[str, Any]:
    """Return the defaults that depend on the GPU; none without CUDA. See `engine_arguments`."""
    if not current_platform.is_cuda():
        return {}
    dtype = str(engine_args["dtype"]).removeprefix("torch.")
    arguments: dict[str, Any] = {}
    if not {"attention_backend", "attention_config"} & set(engine_args):
        capability = current_platform.get_device_capability()
        arguments["attention_backend"] = attention_backend(
            tuple(capability or (0, 0)), dtype, _head_size(model.config())
        )
    # With these arguments, the size of the loaded weights is not known here.
    if not {"gpu_memory_utilization", "quantization", "cpu_offload_gb"} & set(engine_args):
        weights = weight_bytes(model.path, dtype, num_layers)
        if weights is not None:
            arguments["gpu_memory_utilization"] = memory_share(
                weights,
                engine_args.get("tensor_parallel_size", 1),
                current_platform.get_device_total_memory(),
            )
    return arguments


def attention_backend(capability: tuple[int, ...], dtype: str, head_size: int) -> str:
    """Return the attention backend that a GPU supports and whose cache this package reads.

    vLLM's own choice is FlashInfer on data-centre Blackwell, and depends on the precision.
    """
    has_flash = (
        capability >= FLASH_ATTENTION_CAPABILITY
        and dtype in HALF_PRECISION
        and head_size <= FLASH_ATTENTION_HEAD_SIZE
        and head_size % 8 == 0
    )
    return "FLASH_ATTN" if has_flash else "TRITON_ATTN"


def memory_share(weights: int, ranks: int, total: int) -> float:
    """Return the share of each GPU's ``total`` bytes to request, if ``ranks`` GPUs share weights.

    Raises:
        InvalidInputError: The memory does not suffice.
    """
    needed = weights / ranks + WORKING_BYTES
    if needed > MAX_GPU_MEMORY_SHARE * total:
        gib = 1024**3
        raise InvalidInputError(
            f"the model's layers up to the highest head take {weights / gib:.1f} GiB on {ranks} "
            f"GPU, and need about {WORKING_BYTES / gib:.0f} GiB beside, but a GPU here has "
            f"{total / gib:.1f} GiB: spread it over several with "
            'engine_args={"tensor_parallel_size": 2}, or take a smaller model'
        )
    return max(GPU_MEMORY_SHARE, round(needed / total, 3))


def weight_bytes(folder: Path, dtype: str, num_layers: int | None = None) -> int | None:
    """Compute the size of loaded weights in bytes; ``None`` if there are no safetensors files."""
    width = 2 if dtype in HALF_PRECISION else 4
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  It is not a mapping.
                layer = re.search(r"\blayers\.(\d+)\.", name)
                if layer is None or num_layers is None or int(layer[1]) < num_layers:
                    tensor = file.get_slice(name)
                    stored = tensor.get_dtype()
                    bits = int((re.findall(r"\d+", stored) or [8])[0])
                    total += prod(tensor.get_shape()) * (
                        width if stored in PLAIN_TYPES else bits // 8
                    )
    return total or None


def _head_size(config: Any) -> int:
    """Return the size of a model's largest attention head."""
    plain = config.hidden_size // config.num_attention_heads
    names = ("head_dim", "global_head_dim")
    return max(int(getattr(config, name, None) or plain) for name in names)
