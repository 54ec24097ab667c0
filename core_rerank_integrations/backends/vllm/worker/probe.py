"""The queries of the selected heads, and what these heads attend to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform

from core_rerank_integrations.backends.vllm.compat import PagedKeys, check_layer, sliding_window
from core_rerank_integrations.errors import UnsupportedModelError
from core_rerank_integrations.heads.head_set import HeadSet

MAX_ROWS = 64
"""Number of query rows of one request whose attention is in memory at once."""
MAX_ELEMENTS = 1 << 25
"""Number of values of attention and keys that are in memory at once, in float32, over all heads."""


class QueryRows(NamedTuple):
    """Query rows of one request in a step.

    Attributes:
        request: Index of the request in the step's batch.
        first: Index of the first row in the step's batch of tokens.
        number: Number of rows.
        length: Length of the request's sequence up to the last row.
    """

    request: int
    first: int
    number: int
    length: int

    def split(self) -> Iterator[QueryRows]:
        """Yield the rows in parts of at most `MAX_ROWS`."""
        begin = self.length - self.number
        for done in range(0, self.number, MAX_ROWS):
            number = min(MAX_ROWS, self.number - done)
            yield QueryRows(self.request, self.first + done, number, begin + done + number)


class Probe:
    """The selected heads of one attention layer that are on this rank.

    It wraps the layer's attention implementation. vLLM calls that inside its splitting op, so
    outside of compiled graphs.
    """

    def __init__(
        self, name: str, layer: Any, heads: Sequence[tuple[int, int]], rank: int, is_last: bool
    ) -> None:
        check_layer(name, layer)
        first = rank * layer.num_heads
        # ``heads`` are (head, index in the head set), over all tensor parallel ranks.
        local = [item for item in heads if 0 <= item[0] - first < layer.num_heads]
        self.indices = [index for _, index in local]
        self.heads = _on_device([head - first for head, _ in local])
        self.kv_heads = self.heads // (layer.num_heads // layer.num_kv_heads)
        self.head_size: int = layer.head_size
        self.scale: float = layer.impl.scale
        self.soft_cap: float = getattr(layer.impl, "logits_soft_cap", None) or 0.0
        self.window = sliding_window(layer.impl)
        self.keys = PagedKeys(layer)
        # Of the current step: [tokens, local heads, head size] and [requests, blocks].
        self.queries: Tensor | None = None
        self.block_table: Tensor | None = None
        # Values and output of the layer in the current step, until it is tested.
        self.computed: tuple[Tensor, Tensor] | None = None
        self.is_tested = False
        self._is_last = is_last
        self._implementation = layer.impl
        self._wrap(layer.impl)

    def end_step(self) -> None:
        """Drop the queries, which must not be used in the next step."""
        self.queries = self.block_table = self.computed = None

    def remove(self) -> None:
        """Restore the layer's own implementation."""
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
                if self._is_last and self.is_tested:
                    # The keys are in the cache already, and the output is not used.
                    return kwargs["output"].zero_()
            output = forward(layer, query, key, value, cache, metadata, *arguments, **kwargs)
            if metadata is not None and not self.is_tested:
                # Copies, because a compiled graph reuses the memory.
                self.computed = (value.clone(), output.clone())
            return output

        implementation.forward = probed


class Probes:
    """All selected heads of a model on this rank, read together after a step.

    Args:
        vllm_config: Configuration of the model, after the model was built.
        head_set: The heads to read, over all tensor parallel ranks.
        stop_after_last: Whether nothing above the highest head's queries and keys is needed.

    Attributes:
        indices: Index of each local head in the head set, shape [local heads].
        weights: Weight of each local head, float32, shape [local heads].

    Raises:
        UnsupportedModelError: A layer has no standard attention, or one that cannot be read.
    """

    def __init__(self, vllm_config: Any, head_set: HeadSet, stop_after_last: bool = False) -> None:
        layers = _attention_layers(vllm_config)
        if missing := set(head_set.by_layer) - set(layers):
            raise UnsupportedModelError(
                f"layers {sorted(missing)} of this model have no standard attention to read"
            )
        rank = get_tensor_model_parallel_rank()
        last = head_set.highest_layer if stop_after_last else None
        self._probes = [
            Probe(*layers[layer], heads, rank, layer == last)
            for layer, heads in head_set.by_layer.items()
        ]
        # Heads of one size are computed together.
        by_size: dict[int, list[Probe]] = {}
        for probe in self._probes:
            if probe.indices:
                by_size.setdefault(probe.head_size, []).append(probe)
        self._groups = [_Group(probes) for probes in by_size.values()]
        self.indices = _on_device(
            [index for group in self._groups for probe in group.probes for index in probe.indices]
        )
        # vLLM builds models with their own type as the default type of tensors.
        weights = torch.tensor([head.weight for head in head_set.heads], dtype=torch.float32)
        self.weights = weights.to(self.indices.device)[self.indices]

    @property
    def ready(self) -> bool:
        """Whether the step called all layers, which a graph that was captured whole does not."""
        return all(probe.queries is not None for probe in self._probes)

    def end_step(self) -> None:
        """Drop what the layers computed in the current step."""
        for probe in self._probes:
            probe.end_step()

    def remove(self) -> None:
        """Restore the layers' own implementations."""
        for probe in self._probes:
            probe.remove()

    def attention(self, requests: Sequence[QueryRows]) -> list[Tensor]:
        """Compute the attention of rows of the current step, summed over the rows of each request.

        Requests and layers go through the same few operations together. Requests of similar length
        are computed together, because padding is computed too.

        Returns:
            For each request float32, shape [local heads, tokens].
        """
        sums = [
            torch.zeros(len(self.weights), rows.length, device=self.weights.device)
            for rows in requests
        ]
        parts = [(index, part) for index, rows in enumerate(requests) for part in rows.split()]
        parts.sort(key=lambda item: item[1].length)
        while parts and self._groups:
            count = self._fitting([part for _, part in parts])
            batch, parts = parts[-count:], parts[:-count]
            rows = [part for _, part in batch]
            attention = torch.cat([group.attention(rows).sum(dim=2) for group in self._groups], 1)
            for (index, part), part_sum in zip(batch, attention, strict=True):
                sums[index][:, : part.length] += part_sum[:, : part.length]
        return sums

    def error(self, rows: QueryRows) -> float:
        """Compute how far the probes' attention is from that of the layers themselves.

        The attention of a whole short prompt, times its values, is compared with the output of
        each layer. This detects a wrong scale, mask, head or cache layout.

        Returns:
            The largest difference in any layer, relative to its largest value.
        """
        errors: list[float] = []
        for group in self._groups:
            sizes = [len(probe.indices) for probe in group.probes]
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
                errors.append(float(difference.abs().max() / values.abs().max()))
        for probe in self._probes:
            probe.is_tested = True
        return float(torch.tensor(errors or [0.0]).max())  # Python's max would drop a NaN.

    def _fitting(self, parts: Sequence[QueryRows]) -> int:
        """Return how many of the last of ``parts``, the longest, may be computed at once."""
        tokens = parts[-1].length
        count, rows = 0, 0
        for part in reversed(parts):
            rows = max(rows, part.number)
            elements = sum(group.elements(rows, tokens) for group in self._groups)
            if count and (count + 1) * elements > MAX_ELEMENTS:
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
            self._by_head([window or 1 << 30 for window in windows], torch.long)
            if any(windows)
            else None
        )

    def elements(self, rows: int, tokens: int) -> int:
        """Return the number of values of one request's attention and keys."""
        heads = sum(len(probe.indices) for probe in self.probes)
        return heads * (rows * tokens + (rows + tokens) * self.probes[0].head_size)

    def attention(self, parts: Sequence[QueryRows]) -> Tensor:
        """Compute attention, float32 [parts, heads, most rows, most tokens]; 0 in the padding."""
        rows, tokens = max(part.number for part in parts), max(part.length for part in parts)
        request, first, number, end = _on_device(parts).unbind(dim=1)
        row, column = (torch.arange(size, device=request.device) for size in (rows, tokens))

        queries, keys = [], []
        for probe in self.probes:
            # `Probes.ready` holds here, so both are set.
            step_queries, blocks = cast(Tensor, probe.queries), cast(Tensor, probe.block_table)
            indices = (first[:, None] + row).clamp(max=len(step_queries) - 1)
            queries.append(step_queries[indices])
            keys.append(probe.keys.read(blocks[request], probe.kv_heads, tokens))
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

    def _by_head(self, values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return one value per layer for each of its heads, shape [heads, 1, 1]."""
        spread = [
            value for probe, value in zip(self.probes, values, strict=True) for _ in probe.indices
        ]
        device = self.probes[0].heads.device
        return torch.tensor(spread, dtype=dtype, device=device)[:, None, None]


def _on_device(values: Sequence[Any]) -> Tensor:
    """Return whole numbers as a tensor, without waiting for the device's pending work."""
    device = current_platform.device_type
    tensor = torch.tensor(values, dtype=torch.long, pin_memory=device == "cuda")
    return tensor.to(device, non_blocking=True)


def _attention_layers(vllm_config: Any) -> dict[int, tuple[str, Any]]:
    """Return name and module of a decoder's attention layers, by their indices.

    Raises:
        UnsupportedModelError: There are several decoders, so an index is ambiguous.
    """
    context = vllm_config.compilation_config.static_forward_context
    layers: dict[int, tuple[str, Any]] = {}
    for name, module in context.items():
        # The draft model of speculative decoding numbers its layers in the same way.
        if not isinstance(module, Attention) or name.startswith("draft_model."):
            continue
        index = extract_layer_index(name)
        if index in layers:
            raise UnsupportedModelError(
                f"{layers[index][0]} and {name} are both layers number {index}, so it is not clear "
                "whose heads to read"
            )
        layers[index] = name, module
    return layers
