"""Keeps what an attention layer was asked, and computes who its heads attend to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform

from core_rerank_integrations.backends.vllm.compat import PagedKeys, check_layer, sliding_window
from core_rerank_integrations.errors import UnsupportedModelError


class Probe:
    """The selected heads of one attention layer, as far as they live on this rank.

    It wraps the layer's attention implementation, which vLLM calls inside its splitting op and
    so outside of compiled graphs.

    Args:
        name: The layer's name in the model.
        layer: vLLM's ``Attention`` module.
        heads: (head, weight, place in the head set) of the whole layer, over all tensor
            parallel ranks.
        rank: Tensor parallel rank of this process.
        last: Whether nothing after this layer's queries and keys is needed.
    """

    def __init__(
        self,
        name: str,
        layer: Any,
        heads: Sequence[tuple[int, float, int]],
        rank: int,
        last: bool = False,
    ) -> None:
        check_layer(name, layer)
        first = rank * layer.num_heads
        local = [item for item in heads if first <= item[0] < first + layer.num_heads]
        device = current_platform.device_type
        self._heads = torch.tensor([head - first for head, _, _ in local], device=device).long()
        self._kv_heads = self._heads // (layer.num_heads // layer.num_kv_heads)
        self.weights = torch.tensor([weight for _, weight, _ in local], device=device).float()
        self.places = torch.tensor([place for _, _, place in local], device=device).long()
        self._scale: float = layer.impl.scale
        self._soft_cap: float = getattr(layer.impl, "logits_soft_cap", None) or 0.0
        self._window = sliding_window(layer.impl)
        self._keys = PagedKeys(layer)
        self._queries: Tensor | None = None
        self._test: tuple[Tensor, Tensor] | None = None
        self.is_tested = False
        self._block_table: Tensor | None = None
        self._last = last
        self._implementation = layer.impl
        self._wrap(layer.impl)

    @property
    def ready(self) -> bool:
        """Whether the layer was called in the current step, where the probe could see it.

        A graph that was captured as a whole runs without calling the layer.
        """
        return self._queries is not None

    def forget(self) -> None:
        """End of a step: its queries must not pass for those of the next."""
        self._queries = self._block_table = self._test = None

    def error(self, request: int, rows: range) -> float:
        """How far this probe's attention is from what the layer itself computed.

        The attention of a whole short prompt, times its values, is compared with the layer's
        output: that tells a wrong scale, mask, head or layout of the cache.

        Args:
            request: The request's place in the step's batch.
            rows: Places of its tokens, all of them, in the step's batch of tokens.

        Returns:
            The largest difference, relative to the largest value.
        """
        if self._test is None:
            return float("inf")
        values, output = (tensor[rows.start : rows.stop].float() for tensor in self._test)
        values = values[:, self._kv_heads].transpose(0, 1)
        expected = output.view(len(rows), -1, values.shape[-1])[:, self._heads].transpose(0, 1)
        difference = self._attention(request, rows, len(rows)) @ values - expected
        if not difference.numel():
            return 0.0
        return float(difference.abs().max() / values.abs().max())

    def remove(self) -> None:
        """Give the layer back its own implementation."""
        del self._implementation.forward

    def attention(self, request: int, rows: range, tokens: int) -> Tensor:
        """Attention of some of the current step's tokens, summed over these tokens.

        Args:
            request: The request's place in the step's batch.
            rows: Places of the tokens in the step's batch of tokens.
            tokens: Length of the request's sequence up to the last of ``rows``.

        Returns:
            Float32 tensor, shape [heads on this rank, tokens].
        """
        return self._attention(request, rows, tokens).sum(dim=1)

    def _attention(self, request: int, rows: range, tokens: int) -> Tensor:
        assert self._queries is not None
        assert self._block_table is not None
        device = self._queries.device
        query = self._queries[rows.start : rows.stop].float().transpose(0, 1)
        keys = self._keys.read(self._block_table[request], self._kv_heads, tokens)
        logits = query @ keys.transpose(1, 2) * self._scale
        if self._soft_cap:
            logits = self._soft_cap * torch.tanh(logits / self._soft_cap)
        row = torch.arange(tokens - len(rows), tokens, device=device)[:, None]
        column = torch.arange(tokens, device=device)[None]
        hidden = column > row
        if self._window is not None:
            hidden |= column <= row - self._window
        return logits.masked_fill_(hidden, float("-inf")).softmax(dim=-1)

    def _wrap(self, implementation: Any) -> None:
        forward = implementation.forward

        def probed(
            layer: Any, query: Tensor, key: Tensor, value: Tensor, cache: Any, metadata: Any,
            *arguments: Any, **kwargs: Any,
        ) -> Any:  # fmt: skip
            if metadata is not None:  # None while vLLM profiles and warms up.
                self._queries = query[: metadata.num_actual_tokens, self._heads]
                self._block_table = metadata.block_table
                if self._last and self.is_tested:
                    # The keys are in the cache already; nobody reads the output.
                    return kwargs["output"].zero_()
            output = forward(layer, query, key, value, cache, metadata, *arguments, **kwargs)
            if metadata is not None and not self.is_tested:
                # Copies: a compiled graph uses the memory again for what comes next.
                self._test = (value.clone(), output.clone())
            return output

        implementation.forward = probed


def install_probes(
    vllm_config: Any, heads: Sequence[tuple[int, int, float]], stop_after_last: bool = False
) -> list[Probe]:
    """Probe the attention layers that hold the heads of a head set.

    Args:
        vllm_config: Of the model, after it was built.
        heads: (layer, head, weight) of the whole head set.
        stop_after_last: Whether nothing above the highest head's queries and keys is needed.

    Raises:
        UnsupportedModelError: A layer has no standard attention, or one that cannot be read.
    """
    by_layer: dict[int, list[tuple[int, float, int]]] = {}
    for place, (layer, head, weight) in enumerate(heads):
        by_layer.setdefault(layer, []).append((head, weight, place))
    context = vllm_config.compilation_config.static_forward_context
    layers = {
        extract_layer_index(name): (name, module)
        for name, module in context.items()
        if isinstance(module, Attention)
    }
    if missing := set(by_layer) - set(layers):
        raise UnsupportedModelError(
            f"layers {sorted(missing)} of this model have no standard attention to read"
        )
    rank = get_tensor_model_parallel_rank()
    last = max(by_layer) if stop_after_last else None
    return [
        Probe(*layers[layer], by_layer[layer], rank, last=layer == last)
        for layer in sorted(by_layer)
    ]
