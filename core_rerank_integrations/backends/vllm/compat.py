"""Everything that depends on vLLM's version and platform. What is unknown here is refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core_rerank_integrations.backends.vllm.request import RequestOptions
from core_rerank_integrations.errors import UnsupportedModelError

SUPPORTED_VERSIONS = ("0.26", "0.29", "0.30", "0.31", "0.32", "0.33")
"""Minor versions on which this was run; docs/vllm.md says how."""
LINEAR_KEYS = ("FLASH_ATTN", "TRITON_ATTN")
"""Attention backends that store the keys of a block as [slot, head size], before its values."""
PACKED_KEYS = ("CPU_ATTN",)
"""Attention backends that pack keys for the processor's instruction set."""


def is_supported_version() -> bool:
    """Return whether the installed vLLM is supported."""
    import vllm

    return ".".join(vllm.__version__.split(".")[:2]) in SUPPORTED_VERSIONS


def check_version() -> None:
    """Check the installed vLLM.

    Raises:
        UnsupportedModelError: The version or its model runner is not supported.
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
    """Make cache blocks that reach past a request's shared prefix private to that request.

    The instruction is the same in every prompt. Its blocks would otherwise come from the prefix
    cache, and the queries of its tokens, which are part of the score, would not be computed. vLLM
    has no setting for this, so the request's id is added to the hash of these blocks. If a version
    hashes blocks in another way, the caller's check of the number of rows fails.
    """
    from vllm.v1.core import kv_cache_utils

    original = kv_cache_utils.generate_block_hash_extra_keys
    if hasattr(original, "core_rerank"):
        return

    def with_request_key(request: Any, start: int, end: int, mm_index: int) -> Any:
        keys, next_mm_index = original(request, start, end, mm_index)
        options = RequestOptions.of(request.pooling_params or request.sampling_params)
        if options is not None and end > options.unshared:
            keys = (*(keys or ()), ("core_rerank", request.request_id))
        return keys, next_mm_index

    with_request_key.core_rerank = True  # type: ignore[attr-defined]
    kv_cache_utils.generate_block_hash_extra_keys = with_request_key


def sliding_window(implementation: Any) -> int | None:
    """Return how many tokens an attention implementation sees, itself included; ``None``: all."""
    window = getattr(implementation, "sliding_window", None)
    if isinstance(window, tuple):  # (tokens before, tokens after); -1 sets no limit.
        return window[0] + 1 if window[0] >= 0 else None
    return window if window is not None and window > 0 else None


class PagedKeys:
    """The keys of one attention layer in vLLM's paged cache."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._is_packed = layer.attn_backend.get_name() in PACKED_KEYS
        self._order: Tensor | None = None

    def read(self, blocks: Tensor, heads: Tensor, tokens: int) -> Tensor:
        """Read the keys of sequences.

        Args:
            blocks: Rows of the block table, shape [sequences, blocks]. Blocks beyond the end of a
                sequence are read too, and hold anything.
            heads: KV heads of this rank.
            tokens: Number of tokens of each sequence.

        Returns:
            Shape [sequences, heads, tokens, head size].
        """
        cache = self._layer.kv_cache  # [blocks, KV heads, slots, 2 * head size]
        slots, size = cache.shape[2], cache.shape[3] // 2
        indices = blocks[:, : -(-tokens // slots), None].long()
        keys: Tensor
        if self._is_packed:
            if self._order is None:
                self._order = _packed_order(self._layer)
            halves = cache.view(*cache.shape[:2], 2 * slots, size)[:, :, :slots].flatten(2)
            keys = halves[indices, heads][..., self._order].unflatten(-1, (slots, size))
        else:
            keys = cache[..., :size][indices, heads]
        return keys.transpose(1, 2).flatten(2, 3)[:, :, :tokens]


def _packed_order(layer: Any) -> Tensor:
    """Find the index of each element (slot, dimension) in a block of packed keys.

    Coordinates are written through the backend's own cache update and read back, in base-128
    digits, which bfloat16 represents exactly.

    Raises:
        UnsupportedModelError: What is read back is not a permutation.
    """
    cache = layer.kv_cache
    _, heads, slots, width = cache.shape
    size = width // 2
    codes = torch.arange(slots * size).view(slots, 1, size)
    packed = torch.zeros(slots * size, dtype=torch.long)
    for digit in range(3):
        values = (codes // 128**digit % 128).expand(slots, heads, size).to(cache.dtype)
        scratch = torch.zeros(1, heads, slots, width, dtype=cache.dtype)
        layer.impl.do_kv_cache_update(
            layer, values.contiguous(), torch.zeros_like(values), scratch, torch.arange(slots)
        )
        keys = scratch.view(heads, 2 * slots, size)[0, :slots].flatten()
        packed += keys.round().long() * 128**digit
    if not packed.sort().values.equal(torch.arange(slots * size)):
        raise UnsupportedModelError("the layout of vLLM's packed keys was not understood")
    return packed.argsort()


def check_layer(name: str, layer: Any) -> None:
    """Check that the attention of a layer can be recomputed from its queries and keys.

    Raises:
        UnsupportedModelError: It cannot be recomputed; the message names the layer and the reason.
    """
    from vllm.model_executor.layers.attention import Attention

    # The metadata of a subclass may describe other requests than those of the step.
    if type(layer) is not Attention:
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
            f"the KV cache is {layer.kv_cache_dtype}, which vLLM selects for checkpoints with FP8 "
            "scales; reranking needs keys in full precision: set engine_args "
            'kv_cache_dtype="bfloat16"'
        )
    for attribute, meaning in (("alibi_slopes", "ALiBi"), ("sinks", "attention sinks")):
        if getattr(layer.impl, attribute, None) is not None:
            raise UnsupportedModelError(f"{name} uses {meaning}, which reranking does not read")


def step_requests(runner: Any, scheduler_output: Any) -> list[tuple[str, int, int]]:
    """Return the requests of the step that a model runner has just run, in the order of its batch.

    Each is its id, the index of its first token in the step, and the index after its last.
    """
    scheduled: dict[str, int] = scheduler_output.num_scheduled_tokens
    if not scheduled:
        return []
    computed = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
    cached = scheduler_output.scheduled_cached_reqs
    computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    # The V2 runner holds its batch in the state of the step, the V1 runner in an attribute.
    state = getattr(runner, "execute_model_state", None)
    batch = getattr(state, "input_batch", None) or runner.input_batch
    return [
        (name, computed[name], computed[name] + scheduled[name])
        for name in batch.req_ids
        if name in scheduled
    ]
