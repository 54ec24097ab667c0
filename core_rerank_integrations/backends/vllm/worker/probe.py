"""Keeps what attention layers were asked, and computes what their heads attend to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform

from core_rerank_integrations.backends.vllm.compat import PagedKeys, check_layer, sliding_window
from core_rerank_integrations.errors import UnsupportedModelError

MOST_ROWS = 64
"""Query rows of one request whose attention is held at once."""
MOST_ELEMENTS = 1 << 25
"""Of attention and keys that are held at once, in float32, over all heads."""


class Rows(NamedTuple):
    """Query rows of one request in a step."""

    request: int
    """Its place in the step's batch."""
    first: int
    """Place of the first row in the step's batch of tokens."""
    number: int
    tokens: int
    """Length of the request's sequence up to the last row."""

    def split(self) -> Iterator[Rows]:
        """The same in parts of at most `MOST_ROWS`."""
        begin = self.tokens - self.number
        for done in range(0, self.number, MOST_ROWS):
            number = min(MOST_ROWS, self.number - done)
            yield Rows(self.request, self.first + done, number, begin + done + number)


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
        self.local = [item for item in heads if first <= item[0] < first + layer.num_heads]
        self.head_size: int = layer.head_size
        self.scale: float = layer.impl.scale
        self.soft_cap: float = getattr(layer.impl, "logits_soft_cap", None) or 0.0
        self.window = sliding_window(layer.impl)
        device = current_platform.device_type
        self.heads = torch.tensor([head - first for head, _, _ in self.local], device=device).long()
        self.kv_heads = self.heads // (layer.num_heads // layer.num_kv_heads)
        self.keys = PagedKeys(layer)
        self.queries: Tensor | None = None
        self.block_table: Tensor | None = None
        self.computed: tuple[Tensor, Tensor] | None = None
        """Values and output of the layer in the current step, while it is tested."""
        self.is_tested = False
        self._last = last
        self._implementation = layer.impl
        self._wrap(layer.impl)

    def forget(self) -> None:
        """End of a step: its queries must not pass for those of the next."""
        self.queries = self.block_table = self.computed = None

    def remove(self) -> None:
        """Give the layer back its own implementation."""
        del self._implementation.forward

    def _wrap(self, implementation: Any) -> None:
        forward = implementation.forward

        def probed(
            layer: Any, query: Tensor, key: Tensor, value: Tensor, cache: Any, metadata: Any,
            *arguments: Any, **kwargs: Any,
        ) -> Any:  # fmt: skip
            if metadata is not None:  # None while vLLM profiles and warms up.
                self.queries = query[: metadata.num_actual_tokens, self.heads]
                self.block_table = metadata.block_table
                if self._last and self.is_tested:
                    # The keys are in the cache already; nobody reads the output.
                    return kwargs["output"].zero_()
            output = forward(layer, query, key, value, cache, metadata, *arguments, **kwargs)
            if metadata is not None and not self.is_tested:
                # Copies: a compiled graph uses the memory again for what comes next.
                self.computed = (value.clone(), output.clone())
            return output

        implementation.forward = probed


class Probes:
    """All selected heads of a model on this rank, read together after a step.

    Args:
        vllm_config: Of the model, after it was built.
        heads: (layer, head, weight) of the whole head set.
        stop_after_last: Whether nothing above the highest head's queries and keys is needed.

    Attributes:
        weights: Of this rank's heads, float32, shape [local heads].
        places: Their places in the head set, shape [local heads].

    Raises:
        UnsupportedModelError: A layer has no standard attention, or one that cannot be read.
    """

    def __init__(
        self,
        vllm_config: Any,
        heads: Sequence[tuple[int, int, float]],
        stop_after_last: bool = False,
    ) -> None:
        by_layer: dict[int, list[tuple[int, float, int]]] = {}
        for place, (layer, head, weight) in enumerate(heads):
            by_layer.setdefault(layer, []).append((head, weight, place))
        layers = _attention_layers(vllm_config)
        if missing := set(by_layer) - set(layers):
            raise UnsupportedModelError(
                f"layers {sorted(missing)} of this model have no standard attention to read"
            )
        rank = get_tensor_model_parallel_rank()
        last = max(by_layer) if stop_after_last else None
        self._layers = [
            Probe(*layers[layer], by_layer[layer], rank, last=layer == last)
            for layer in sorted(by_layer)
        ]
        # Heads of one size are computed together.
        by_size: dict[int, list[Probe]] = {}
        for probe in self._layers:
            if probe.local:
                by_size.setdefault(probe.head_size, []).append(probe)
        self._groups = [_Group(probes) for probes in by_size.values()]
        local = [head for group in self._groups for probe in group.probes for head in probe.local]
        device = current_platform.device_type
        self.weights = torch.tensor([weight for _, weight, _ in local], device=device).float()
        self.places = torch.tensor([place for _, _, place in local], device=device).long()

    @property
    def ready(self) -> bool:
        """Whether all layers were called in the current step, where the probes could see it.

        A graph that was captured as a whole runs without calling the layers.
        """
        return all(probe.queries is not None for probe in self._layers)

    def forget(self) -> None:
        """End of a step."""
        for probe in self._layers:
            probe.forget()

    def remove(self) -> None:
        """Give the layers back their own implementations."""
        for probe in self._layers:
            probe.remove()

    def attention(self, requests: Sequence[Rows]) -> list[Tensor]:
        """Attention of some of the current step's tokens, summed over each request's.

        Requests and layers go through the same few operations together, those of like length
        first, for what is padded is computed too.

        Returns:
            Per request float32, shape [local heads, tokens].
        """
        sums = [
            torch.zeros(len(self.weights), rows.tokens, device=self.weights.device)
            for rows in requests
        ]
        parts = [(place, part) for place, rows in enumerate(requests) for part in rows.split()]
        parts.sort(key=lambda item: item[1].tokens)
        while parts and self._groups:
            count = self._fitting([part for _, part in parts])
            batch, parts = parts[-count:], parts[:-count]
            rows = [part for _, part in batch]
            attention = torch.cat([group.attention(rows).sum(dim=2) for group in self._groups], 1)
            for (place, part), summed in zip(batch, attention, strict=True):
                sums[place][:, : part.tokens] += summed[:, : part.tokens]
        return sums

    def error(self, rows: Rows) -> float:
        """How far the probes' attention is from what the layers themselves computed.

        The attention of a whole short prompt, times its values, is compared with the layer's
        output: that tells a wrong scale, mask, head or layout of the cache.

        Args:
            rows: All tokens of a request.

        Returns:
            The largest difference of any layer, relative to its largest value.
        """
        worst = 0.0
        for group in self._groups:
            sizes = [len(probe.local) for probe in group.probes]
            attention = torch.split(group.attention([rows])[0], sizes)
            for probe, weights in zip(group.probes, attention, strict=True):
                if probe.computed is None:
                    return float("inf")
                values, output = (
                    tensor[rows.first : rows.first + rows.number].float()
                    for tensor in probe.computed
                )
                values = values[:, probe.kv_heads].transpose(0, 1)
                expected = output.view(rows.number, -1, values.shape[-1])[:, probe.heads]
                difference = weights @ values - expected.transpose(0, 1)
                worst = max(worst, float(difference.abs().max() / values.abs().max()))
        for probe in self._layers:
            probe.is_tested = True
        return worst

    def _fitting(self, parts: Sequence[Rows]) -> int:
        """How many of the last of ``parts``, the longest, may be computed at once."""
        tokens = parts[-1].tokens
        count, rows = 0, 0
        for part in reversed(parts):
            rows = max(rows, part.number)
            elements = sum(group.elements(rows, tokens) for group in self._groups)
            if count and (count + 1) * elements > MOST_ELEMENTS:
                break
            count += 1
        return count


class _Group:
    """Layers of one head size, whose heads are computed together."""

    def __init__(self, probes: Sequence[Probe]) -> None:
        self.probes = probes
        self._scale = self._by_head([probe.scale for probe in probes])
        caps = [probe.soft_cap for probe in probes]
        self._soft_cap = self._by_head([cap or float("inf") for cap in caps]) if any(caps) else None
        windows = [probe.window for probe in probes]
        self._window = (
            self._by_head([window or 1 << 30 for window in windows]) if any(windows) else None
        )

    def elements(self, rows: int, tokens: int) -> int:
        """Numbers that one request's attention and keys take."""
        heads = sum(len(probe.local) for probe in self.probes)
        return heads * (rows * tokens + (rows + tokens) * self.probes[0].head_size)

    def attention(self, parts: Sequence[Rows]) -> Tensor:
        """Float32, shape [parts, heads, most rows, most tokens]; 0 beyond a part's own."""
        rows, tokens = (max(part[field] for part in parts) for field in (2, 3))
        device = self._scale.device
        request, first, number, end = _on_device(parts, device).unbind(dim=1)
        row, column = (torch.arange(length, device=device) for length in (rows, tokens))

        queries, keys = [], []
        for probe in self.probes:
            assert probe.queries is not None
            assert probe.block_table is not None
            places = (first[:, None] + row).clamp(max=len(probe.queries) - 1)
            queries.append(probe.queries[places])
            keys.append(probe.keys.read(probe.block_table[request], probe.kv_heads, tokens))
        query = torch.cat(queries, dim=2).float().transpose(1, 2)
        logits = query @ torch.cat(keys, dim=1).float().transpose(2, 3) * self._scale
        if self._soft_cap is not None:
            capped = self._soft_cap * torch.tanh(logits / self._soft_cap)
            logits = torch.where(self._soft_cap.isinf(), logits, capped)

        position = ((end - number)[:, None] + row)[:, None, :, None]
        hidden = column > position
        if self._window is not None:
            hidden = hidden | (column <= position - self._window)
        attention = logits.masked_fill_(hidden, float("-inf")).softmax(dim=-1)
        padded = (row >= number[:, None])[:, None, :, None]
        return attention.masked_fill_(padded, 0.0)

    def _by_head(self, values: Sequence[float]) -> Tensor:
        """One value per layer, for each of its heads, shape [heads, 1, 1]."""
        spread = [
            value for probe, value in zip(self.probes, values, strict=True) for _ in probe.local
        ]
        return torch.tensor(spread, device=self.probes[0].heads.device)[:, None, None]


def _on_device(parts: Sequence[Rows], device: torch.device) -> Tensor:
    """Shape [parts, 4], without a wait for what the device has to do yet."""
    plan = torch.tensor(parts, dtype=torch.long, pin_memory=device.type == "cuda")
    return plan.to(device, non_blocking=True)


def _attention_layers(vllm_config: Any) -> dict[int, tuple[str, Any]]:
    """Name and module of a decoder's attention layers, by their index.

    Raises:
        UnsupportedModelError: Several decoders run, and it is not clear which is meant.
    """
    context = vllm_config.compilation_config.static_forward_context
    found: dict[int, tuple[str, Any]] = {}
    for name, module in context.items():
        # A draft model of speculative decoding numbers its layers alike.
        if not isinstance(module, Attention) or name.startswith("draft_model."):
            continue
        index = extract_layer_index(name)
        if index in found:
            raise UnsupportedModelError(
                f"{found[index][0]} and {name} are both layers number {index}, so it is not clear "
                "whose heads to read"
            )
        found[index] = name, module
    return found
