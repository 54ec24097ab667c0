"""All that depends on vLLM's version and platform. What is not known here is refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core_rerank_integrations.backends.vllm.request import UNSHARED_KEY, rerank_options
from core_rerank_integrations.errors import UnsupportedModelError

SUPPORTED_VERSIONS = ("0.26", "0.29", "0.30", "0.31", "0.32")
"""Minor versions this was run on; of 0.26, the last one for torch 2.11, the sources were read.

What differs between them on the ways taken here is inside of vLLM: all keep keys as [blocks, KV
heads, slots, 2 * head size], accept the pooling task, and name a step's requests alike.
"""

LINEAR_KEYS = ("FLASH_ATTN", "TRITON_ATTN")
"""Attention backends that keep a block's keys as [slot, head size], before its values."""

PACKED_KEYS = ("CPU_ATTN",)
"""Attention backends that pack them for the processor's instruction set."""


def is_supported_version() -> bool:
    """Whether this package knows the vLLM that is installed."""
    import vllm

    return ".".join(vllm.__version__.split(".")[:2]) in SUPPORTED_VERSIONS


def check_version() -> None:
    """Refuse a vLLM that this package does not know.

    Raises:
        UnsupportedModelError: Names the version found and the versions supported.
    """
    import vllm
    from vllm import envs

    if vllm.__version__.startswith("0.26.") and envs.VLLM_USE_V2_MODEL_RUNNER:
        raise UnsupportedModelError(
            "the V2 model runner of vLLM 0.26 does not run pooling models: unset "
            "VLLM_USE_V2_MODEL_RUNNER"
        )
    if not is_supported_version():
        raise UnsupportedModelError(
            f"vLLM {vllm.__version__} is installed; this package reads the caches of vLLM "
            f"{', '.join(SUPPORTED_VERSIONS)}. Install one of these, or use backend='transformers'"
        )


def key_query_blocks_by_request() -> None:
    """Keep cache blocks that reach past a rerank's prefix from being shared between requests.

    The late instruction is the same in every prompt, so its blocks would be served from the
    prefix cache, and the queries of those tokens, which are part of the score, never computed.
    vLLM has no setting for this; its hash of a block is given the request's id as an extra key.
    Should a version hash blocks some other way, the pooler's count of rows catches it.
    """
    from vllm.v1.core import kv_cache_utils

    original = kv_cache_utils.generate_block_hash_extra_keys
    if hasattr(original, "core_rerank"):
        return

    def with_request_key(request: Any, start: int, end: int, mm_index: int) -> Any:
        keys, next_mm_index = original(request, start, end, mm_index)
        options = rerank_options(request.pooling_params or request.sampling_params)
        if options is not None and end > options[UNSHARED_KEY]:
            keys = (*(keys or ()), ("core_rerank", request.request_id))
        return keys, next_mm_index

    with_request_key.core_rerank = True  # type: ignore[attr-defined]
    kv_cache_utils.generate_block_hash_extra_keys = with_request_key


def sliding_window(implementation: Any) -> int | None:
    """Tokens an attention layer sees, itself included; ``None`` for all."""
    window = getattr(implementation, "sliding_window", None)
    if isinstance(window, tuple):  # (tokens before, tokens after); -1 for no limit.
        return window[0] + 1 if window[0] >= 0 else None
    return window if window is not None and window > 0 else None


class PagedKeys:
    """Reads keys of one attention layer out of vLLM's paged cache."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._backend: str = layer.attn_backend.get_name()
        self._order: Tensor | None = None

    def read(self, blocks: Tensor, heads: Tensor, tokens: int) -> Tensor:
        """Keys of sequences, shape [sequences, heads, tokens, head size].

        Args:
            blocks: The sequences' rows of the block table; what is beyond a sequence's end is
                read as it is.
            heads: KV heads of this rank.
            tokens: Of each sequence.
        """
        cache = self._layer.kv_cache  # [blocks, KV heads, slots, 2 * head size]
        slots, size = cache.shape[2], cache.shape[3] // 2
        places = blocks[:, : -(-tokens // slots), None].long()
        keys: Tensor
        if self._backend in PACKED_KEYS:
            if self._order is None:
                self._order = _packed_order(self._layer)
            halves = cache.view(*cache.shape[:2], 2 * slots, size)[:, :, :slots].flatten(2)
            keys = halves[places, heads][..., self._order].unflatten(-1, (slots, size))
        else:
            keys = cache[..., :size][places, heads]
        return keys.transpose(1, 2).flatten(2, 3)[:, :, :tokens]


def _packed_order(layer: Any) -> Tensor:
    """Where element (slot, dimension) of a block's keys lies, found by writing it and looking.

    Coordinates are written through the backend's own cache update, in base-128 digits, which
    bfloat16 holds exactly.
    """
    cache = layer.kv_cache
    _, heads, slots, width = cache.shape
    size = width // 2
    codes = torch.arange(slots * size).view(slots, 1, size)
    found = torch.zeros(slots * size, dtype=torch.long)
    for digit in range(3):
        values = (codes // 128**digit % 128).expand(slots, heads, size).to(cache.dtype)
        scratch = torch.zeros(1, heads, slots, width, dtype=cache.dtype)
        layer.impl.do_kv_cache_update(
            layer, values.contiguous(), torch.zeros_like(values), scratch, torch.arange(slots)
        )
        keys = scratch.view(heads, 2 * slots, size)[0, :slots].flatten()
        found += keys.round().long() * 128**digit
    if not found.sort().values.equal(torch.arange(slots * size)):
        raise UnsupportedModelError("the layout of vLLM's packed keys was not understood")
    return found.argsort()


def check_layer(name: str, layer: Any) -> None:
    """Refuse an attention layer whose attention cannot be recomputed from its queries and keys.

    Raises:
        UnsupportedModelError: Names the layer and what it does.
    """
    from vllm.model_executor.layers.attention import Attention

    if type(layer) is not Attention:  # Its metadata may describe other requests than the step's.
        raise UnsupportedModelError(
            f"{name} is a layer of type {type(layer).__name__}, which reranking does not read"
        )
    if target := getattr(layer, "kv_sharing_target_layer_name", None):
        raise UnsupportedModelError(
            f"{name} has no keys of its own, but shares those of {target}: its heads cannot be "
            "read; choose heads of the layers before"
        )
    backend = layer.attn_backend.get_name()
    if backend not in LINEAR_KEYS + PACKED_KEYS:
        raise UnsupportedModelError(
            f"vLLM chose the attention backend {backend} for {name}; reranking reads the caches "
            f"of {', '.join(LINEAR_KEYS + PACKED_KEYS)}: set engine_args attention_backend"
        )
    if "fp8" in str(layer.kv_cache_dtype):
        raise UnsupportedModelError(
            f"the KV cache is {layer.kv_cache_dtype}, which a checkpoint with FP8 scales asks for "
            "on its own; reranking needs keys in full precision: set engine_args "
            'kv_cache_dtype="bfloat16"'
        )
    for attribute, meaning in (("alibi_slopes", "ALiBi"), ("sinks", "attention sinks")):
        if getattr(layer.impl, attribute, None) is not None:
            raise UnsupportedModelError(f"{name} uses {meaning}, which reranking does not read")


def step_requests(runner: Any, scheduler_output: Any) -> list[tuple[str, int, int]]:
    """The requests of the step a model runner has just run, in the order of its batch.

    Both runners: the new one keeps its batch with the state of the step, the old one
    by itself.

    Returns:
        Per request its id, how many tokens of it were computed before, and how many in the step.
    """
    scheduled: dict[str, int] = scheduler_output.num_scheduled_tokens
    if not scheduled:
        return []
    computed = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
    cached = scheduler_output.scheduled_cached_reqs
    computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    state = getattr(runner, "execute_model_state", None)
    batch = getattr(state, "input_batch", None) or runner.input_batch
    return [(name, computed[name], scheduled[name]) for name in batch.req_ids if name in scheduled]
