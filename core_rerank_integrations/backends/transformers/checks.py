"""Dtypes, models whose attention cannot be read, and forks."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from transformers import PretrainedConfig

from core_rerank_integrations.errors import (
    BackendError,
    InvalidInputError,
    UnsupportedModelError,
)

LAYER_TYPES = {"full_attention", "sliding_attention"}
LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
"""RoPE types whose frequencies depend on the largest position of the forward pass."""
UNSUPPORTED_ARGUMENTS = {
    "softcap": "soft-caps its attention logits",
    "s_aux": "has attention sinks",
    "position_bias": "adds a position bias to its attention logits",
}
"""Arguments of Transformers' attention interface that this backend cannot read exactly."""

PROCESS = os.getpid()
"""Process that imported this module, which happens when a model is loaded."""


def check_fork(device: torch.device) -> None:
    """Check that PyTorch can run here: on a CPU, its threads do not survive a fork.

    Raises:
        BackendError: The process is a fork of one that has loaded a model, so PyTorch would wait
            for threads that do not exist.
    """
    if os.getpid() != PROCESS and device.type == "cpu" and torch.get_num_threads() > 1:
        raise BackendError(
            f"process {os.getpid()} cannot run PyTorch: it was forked from process {PROCESS}, "
            "which has used PyTorch's threads. Start processes by multiprocessing's method "
            "'spawn', load no model before the fork, or call torch.set_num_threads(1)"
        )


def check_layer_types(config: PretrainedConfig, num_layers: int) -> None:
    """Check that the first layers are ordinary attention layers.

    Raises:
        UnsupportedModelError: One is of another type.
    """
    layer_types = set((getattr(config, "layer_types", None) or [])[:num_layers])
    if unknown := layer_types - LAYER_TYPES:
        raise UnsupportedModelError(
            f"models of type {config.model_type!r} have layers of type "
            f"{', '.join(sorted(unknown))}, whose heads cannot be read"
        )


def rope_depends_on_length(config: PretrainedConfig) -> bool:
    """Return whether RoPE frequencies depend on the length of the whole prompt."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters.get("rope_type") in LENGTH_DEPENDENT_ROPE


def torch_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype that a name selects on a device.

    Raises:
        InvalidInputError: The name is unknown.
    """
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name in dtypes:
        return dtypes[name]
    if name != "auto":
        raise InvalidInputError(f"dtype must be 'auto' or one of {', '.join(dtypes)}, got {name!r}")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if device.type == "cpu" and _has_bfloat16() else torch.float32


def _has_bfloat16() -> bool:
    # Emulated bfloat16 is slower than float32, so it does not count.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in probes)


def check_arguments(model: str, arguments: Mapping[str, object]) -> None:
    """Check the arguments that a model passes to Transformers' attention interface.

    Raises:
        UnsupportedModelError: The model computes attention in a way that cannot be read.
    """
    for argument, meaning in UNSUPPORTED_ARGUMENTS.items():
        if arguments.get(argument) is not None:
            raise UnsupportedModelError(
                f"{model} {meaning}, which the Transformers backend does not support"
            )
    if arguments.get("attention_mask") is not None:
        raise UnsupportedModelError(f"{model} makes an attention mask of its own")
