"""Keeps what an attention layer was asked, and computes who its heads attend to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from core_rerank_integrations.backends.vllm.compat import PagedKeys, check_layer, sliding_window


class Probe:
    """The selected heads of one attention layer, as far as they live on this rank.

    It wraps the layer's attention implementation, which vLLM calls inside its splitting op and
    so outside of compiled graphs.

    Args:
        name: The layer's name in the model.
        layer: vLLM's ``Attention`` module.
        heads: (head, weight) of the whole layer, over all tensor parallel ranks.
        rank: Tensor parallel rank of this process.
        last: Whether nothing after this layer's queries and keys is needed.
    """

    def __init__(
        self,
        name: str,
        layer: Any,
        heads: Sequence[tuple[int, float]],
        rank: int,
        last: bool = False,
    ) -> None:
        check_layer(name, layer)
        first = rank * layer.num_heads
        local = [(head - first, weight) for head, weight in heads]
        local = [(head, weight) for head, weight in local if 0 <= head < layer.num_heads]
        self._heads = [head for head, _ in local]
        groups = layer.num_heads // layer.num_kv_heads
        self._kv_heads = [head // groups for head in self._heads]
        self._weights = [weight for _, weight in local]
        self._scale: float = layer.impl.scale
        self._soft_cap: float = getattr(layer.impl, "logits_soft_cap", None) or 0.0
        self._window = sliding_window(layer.impl)
        self._keys = PagedKeys(layer)
        self._queries: Tensor | None = None
        self._block_table: Tensor | None = None
        self._last = last
        self._wrap(layer.impl)

    def mass(self, request: int, rows: range, tokens: int) -> Tensor:
        """Weighted attention of some of the last step's tokens, summed over tokens and heads.

        Args:
            request: The request's place in the step's batch.
            rows: Places of the tokens in the step's batch of tokens.
            tokens: Length of the request's sequence up to the last of ``rows``.

        Returns:
            Float32 tensor, shape [tokens].
        """
        assert self._queries is not None
        assert self._block_table is not None
        device = self._queries.device
        if not self._heads:
            return torch.zeros(tokens, device=device)
        query = self._queries[rows.start : rows.stop].float().transpose(0, 1)
        kv_heads = torch.tensor(self._kv_heads, device=device)
        keys = self._keys.read(self._block_table[request], kv_heads, tokens)
        logits = query @ keys.transpose(1, 2) * self._scale
        if self._soft_cap:
            logits = self._soft_cap * torch.tanh(logits / self._soft_cap)
        row = torch.arange(tokens - len(rows), tokens, device=device)[:, None]
        column = torch.arange(tokens, device=device)[None]
        hidden = column > row
        if self._window is not None:
            hidden |= column <= row - self._window
        attention = logits.masked_fill_(hidden, float("-inf")).softmax(dim=-1)
        return torch.tensor(self._weights, device=device) @ attention.sum(dim=1)

    def _wrap(self, implementation: Any) -> None:
        forward = implementation.forward

        def probed(
            layer: Any, query: Tensor, key: Tensor, value: Tensor, cache: Any, metadata: Any,
            *arguments: Any, **kwargs: Any,
        ) -> Any:  # fmt: skip
            if metadata is not None:  # None while vLLM profiles and warms up.
                self._queries = query[: metadata.num_actual_tokens, self._heads].clone()
                self._block_table = metadata.block_table
                if self._last:  # The keys are in the cache already; nobody reads the output.
                    return kwargs["output"].zero_()
            return forward(layer, query, key, value, cache, metadata, *arguments, **kwargs)

        implementation.forward = probed
