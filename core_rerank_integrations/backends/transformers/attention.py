"""Attention outputs and attention mass of parts of a packed sequence: pure tensor functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from core_rerank_integrations.heads.head_set import HeadSet

MAX_CODE = 127
MAX_PROBED_ROWS = 128
"""Maximum number of query rows whose attention weights are in memory at once, per head."""


def to_stored(numbers: Tensor, rounds: bool) -> list[Tensor]:
    """Return keys or values, [key heads, tokens, size], as they are cached.

    Args:
        numbers: The keys or values.
        rounds: Whether to round them to eight bits, with a scale per token and key head.

    Returns:
        The numbers; or int8, and the scales, float32, [key heads, tokens, 1].
    """
    if not rounds:
        return [numbers]
    full = numbers.float()
    largest = full.abs().amax(dim=-1, keepdim=True)
    scales = (largest / MAX_CODE).clamp_min(torch.finfo(torch.float32).tiny)
    return [(full / scales).round().to(torch.int8), scales]


def from_stored(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the numbers that `to_stored` has kept."""
    if len(parts) == 1:
        return parts[0]
    codes, scales = parts
    return (codes * scales).to(dtype)


class LayerHeads(NamedTuple):
    """The selected heads of one layer.

    Attributes:
        heads: Index of each head in the layer, shape [selected heads].
        indices: Index of each head in the head set, same shape.
    """

    heads: Tensor
    indices: Tensor

    @classmethod
    def by_layer(cls, head_set: HeadSet, device: torch.device) -> dict[int, LayerHeads]:
        """Group the heads of a head set by layer."""
        return {
            layer: cls(*torch.tensor(heads, device=device).unbind(dim=1))
            for layer, heads in head_set.by_layer.items()
        }


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
) -> Tensor:
    """Compute the causal attention output of a prefix.

    Args:
        query: Shape [heads, tokens, head size].
        key: Shape [key heads, tokens, head size].
        value: Shape [key heads, tokens, value size].
        scale: Factor of the attention logits.
        window: Sliding window in tokens, including the token itself; ``None`` for full attention.

    Returns:
        Shape [heads, tokens, value size].
    """
    tokens = key.shape[1]
    if window is None or tokens <= window:
        return _sdpa(query, key, value, scale)
    # Stripes of rows keep a sliding window's cost linear in the length of the prompt.
    outputs = []
    for start in range(0, tokens, window):
        stop = min(start + window, tokens)
        first_key = max(0, start - window + 1)
        mask = _visible(stop - start, first_key, stop, window, query.device)
        outputs.append(
            _sdpa(
                query[:, start:stop],
                key[:, first_key:stop],
                value[:, first_key:stop],
                scale,
                mask,
            )
        )
    return torch.cat(outputs, dim=1)


def question_attention(
    query: Tensor,
    keys: tuple[Tensor, Tensor],
    values: tuple[Tensor, Tensor] | None,
    heads: LayerHeads | None,
    *,
    scale: float,
    window: int | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the attention of a question's tokens over a prefix and over themselves.

    A question has few rows, so plain matrix products avoid a copy of the prefix's keys and values.

    Args:
        query: Shape [heads, question tokens, head size].
        keys: Keys of the prefix and of the question, each [key heads, tokens, head size].
        values: Values of both, likewise; ``None`` if no output is needed.
        heads: Selected heads of the layer, if any.
        scale: Factor of the attention logits.
        window: Sliding window in tokens, including the token itself; ``None`` for full attention.

    Returns:
        The output, [heads, question tokens, value size], and the attention of the selected heads,
        float32, summed over the question's rows, [selected heads, all tokens].
    """
    prefix_keys, own_keys = (part.float().transpose(1, 2)[:, None] for part in keys)
    key_heads, prefix, length = len(prefix_keys), prefix_keys.shape[-1], query.shape[1]
    tokens = prefix + length
    grouped = query.float().view(key_heads, -1, length, query.shape[2])
    outputs: list[Tensor] = []
    sums = None if heads is None else query.new_zeros(len(heads.heads), tokens).float()
    for row in range(0, length, MAX_PROBED_ROWS):
        rows = grouped[:, :, row : row + MAX_PROBED_ROWS]
        stop = row + rows.shape[2]
        logits = torch.cat((rows @ prefix_keys, rows @ own_keys[..., :stop]), dim=-1) * scale
        visible = _visible(rows.shape[2], 0, prefix + stop, window, query.device)
        attention = logits.masked_fill_(~visible, float("-inf")).softmax(dim=-1)
        if heads is not None and sums is not None:
            sums[:, : prefix + stop] += attention.flatten(0, 1)[heads.heads].sum(dim=1)
        if values is not None:
            prefix_values, own_values = (part.float()[:, None] for part in values)
            before, own = attention[..., :prefix], attention[..., prefix:]
            output = before @ prefix_values + own @ own_values[:, :, :stop]
            outputs.append(output.flatten(0, 1))
    return torch.cat(outputs, dim=1).to(query.dtype) if outputs else None, sums


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None
) -> Tensor:
    groups = query.shape[0] // key.shape[0]
    if mask is not None and groups > 1:
        # On CUDA, grouped heads with a mask would use the slow kernel.
        key, value = (tensor.repeat_interleave(groups, dim=0) for tensor in (key, value))
        groups = 1
    return F.scaled_dot_product_attention(
        query[None],
        key[None],
        value[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=groups > 1,
    )[0]


def _visible(
    rows: int, first_key: int, last_key: int, window: int | None, device: torch.device
) -> Tensor:
    """Return which of the keys ``first_key … last_key - 1`` each of the last ``rows`` sees."""
    row = torch.arange(last_key - rows, last_key, device=device)[:, None]
    column = torch.arange(first_key, last_key, device=device)[None]
    visible = column <= row
    return visible if window is None else visible & (column > row - window)


def attention_sums(
    query: Tensor, key: Tensor, heads: LayerHeads, *, scale: float, window: int | None
) -> Tensor:
    """Sum the attention of the selected heads over the last rows of a prefix.

    Returns:
        Float32, shape [selected heads, tokens of ``key``].
    """
    rows, tokens = query.shape[1], key.shape[1]
    groups = query.shape[0] // key.shape[0]
    keys = key[heads.heads // groups].float().transpose(1, 2)
    mass = torch.zeros(len(heads.heads), tokens, dtype=torch.float32, device=query.device)
    for row in range(0, rows, MAX_PROBED_ROWS):
        chunk = query[heads.heads, row : row + MAX_PROBED_ROWS].float()
        last_key = tokens - rows + row + chunk.shape[1]
        logits = (chunk @ keys[..., :last_key]) * scale
        visible = _visible(chunk.shape[1], 0, last_key, window, query.device)
        attention = logits.masked_fill_(~visible, float("-inf")).softmax(dim=-1)
        mass[:, :last_key] += attention.sum(dim=1)
    return mass
