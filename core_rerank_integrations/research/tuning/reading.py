"""Calibrated attention mass of prompts of one document, as a differentiable function of the model.

All prompts of a step are one packed sequence without padding:

    the tokens that all prompts begin with, once
    document 1, instruction, question 1, N/A
    document 2, instruction, question 2, N/A
    ...

The linear layers see no padding. The attention function pads, and decides which token sees which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from core_rerank_integrations.backends.transformers.packing import LastHeadReached
from core_rerank_integrations.errors import UnsupportedModelError
from core_rerank_integrations.method.prompt import Span, TokenIds
from core_rerank_integrations.method.windows import Window

PADDED_TOGETHER = 8
"""Number of prompts, of similar length, whose attention is computed together."""

_PREFIX, _QUESTION, _BASELINE, _PADDING = range(4)
"""Parts of a prompt. Every part sees the prefix and itself."""


class PromptParts(NamedTuple):
    """The token ids of a prompt of one document, and of the same prompt with ``N/A`` as the query.

    Attributes:
        context: What comes before the query span, shape [tokens].
        instruction: The part of the query span that both prompts have, shape [tokens].
        question: The rest of the query span, shape [tokens].
        baseline: The rest of the query span of the prompt with ``N/A``, shape [tokens].
        document: Tokens of the document and the one token after it.
    """

    context: TokenIds
    instruction: TokenIds
    question: TokenIds
    baseline: TokenIds
    document: Span

    @classmethod
    def of(cls, window: Window) -> PromptParts:
        """Divide the tokens of a prompt."""
        prefix = window.prefix
        border = prefix.context_length
        (document,) = prefix.document_spans
        return cls(
            prefix.ids[:border], prefix.ids[border:], window.question, prefix.baseline, document
        )

    @property
    def length(self) -> int:
        """Number of tokens."""
        return sum(map(len, (self.context, self.instruction, self.question, self.baseline)))


class PackedPrompts:
    """The tokens of one forward pass; collects calibrated mass while the pass runs.

    Args:
        prompts: Prompts of one document each.
        layers: Number of layers that run.
        device: Device of the model.

    Attributes:
        tokens: Token ids, shape [tokens].
        positions: Positions, shape [tokens].
    """

    def __init__(self, prompts: Sequence[Window], layers: int, device: torch.device) -> None:
        parts = [PromptParts.of(prompt) for prompt in prompts]
        self._last_layer = layers - 1
        self._masses: list[Tensor] = []
        self._shared = shared = _shared_length(parts)
        by_length = sorted(range(len(parts)), key=lambda index: parts[index].length)
        self._order = torch.tensor(by_length, device=device).argsort()
        self._groups: list[PaddedPrompts] = []
        tokens, positions = [parts[0].context[:shared]], [np.arange(shared)]
        start = shared
        for first in range(0, len(parts), PADDED_TOGETHER):
            group = [parts[index] for index in by_length[first : first + PADDED_TOGETHER]]
            self._groups.append(PaddedPrompts(group, shared, start, device))
            for part in group:
                border = len(part.context) + len(part.instruction)
                tokens += (part.context[shared:], part.instruction, part.question, part.baseline)
                positions += (
                    np.arange(shared, border + len(part.question)),
                    np.arange(border, border + len(part.baseline)),
                )
                start += part.length - shared
        self.tokens = torch.as_tensor(np.concatenate(tokens), device=device)
        self.positions = torch.as_tensor(np.concatenate(positions), device=device)

    def masses(self) -> Tensor:
        """Return the calibrated mass of each head on each document, [prompts, layers, heads]."""
        return torch.stack(self._masses, dim=1)[self._order]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Compute the attention output of a layer, and collect its calibrated mass.

        Args:
            layer: Index of the layer.
            query: Shape [heads, tokens, head size], with rotary embedding applied.
            key: Shape [key heads, tokens, head size], with rotary embedding applied.
            value: Shape [key heads, tokens, value size].
            scale: Factor of the attention logits.
            window: Sliding window in tokens, including the token itself; ``None`` for full
                attention.

        Returns:
            Shape [heads, tokens, value size].

        Raises:
            LastHeadReached: This is the last layer.
        """
        query = query * scale
        self._masses.append(torch.cat([group.mass(query, key, window) for group in self._groups]))
        if layer == self._last_layer:
            raise LastHeadReached
        outputs = [group.outputs(query, key, value, window) for group in self._groups]
        return torch.cat((self._first_tokens(query, key, value, window), *outputs), dim=1)

    def _first_tokens(
        self, query: Tensor, key: Tensor, value: Tensor, window: int | None
    ) -> Tensor:
        """Return the attention output of the tokens that all prompts begin with."""
        query, key, value = (states[:, : self._shared] for states in (query, key, value))
        groups = len(query) // len(key)
        distance = self.positions[: self._shared, None] - self.positions[: self._shared]
        visible = (distance >= 0) & (distance < (window or self._shared))
        return F.scaled_dot_product_attention(
            query[None],
            key.repeat_interleave(groups, dim=0)[None],
            value.repeat_interleave(groups, dim=0)[None],
            attn_mask=visible,
            scale=1.0,
        )[0]


class PaddedPrompts:
    """Prompts of similar length inside a packed sequence.

    Args:
        prompts: The prompts.
        shared: Number of tokens that all prompts of the sequence begin with.
        start: Index in the sequence of the first token that is not shared.
        device: Device of the model.
    """

    def __init__(
        self, prompts: Sequence[PromptParts], shared: int, start: int, device: torch.device
    ) -> None:
        columns, positions, parts, spans, rows, averages = [], [], [], [], [], []
        for prompt in prompts:
            length, before = prompt.length - shared, len(prompt.context) - shared
            instruction, question, baseline = map(
                len, (prompt.instruction, prompt.question, prompt.baseline)
            )
            border = before + instruction
            columns.append(torch.arange(start, start + length))
            start += length
            position = torch.arange(shared, shared + length)
            position[border + question :] -= question
            positions.append(position)
            part = torch.full((length,), _BASELINE)
            part[:border] = _PREFIX
            part[border : border + question] = _QUESTION
            parts.append(part)
            span = torch.zeros(shared + length)
            span[slice(*prompt.document)] = 1
            spans.append(span)
            rows.append(torch.arange(before, length))
            average = torch.full((length - before,), 1 / (instruction + question))
            average[:instruction] -= 1 / (instruction + baseline)
            average[instruction + question :] = -1 / (instruction + baseline)
            averages.append(average)

        def padded(rows: list[Tensor], value: int = 0) -> Tensor:
            return pad_sequence(rows, batch_first=True, padding_value=value).to(device)

        self._shared = shared
        self._columns, self._span = padded(columns), padded(spans)
        self._rows, self._average = padded(rows), padded(averages)
        part = padded(parts, _PADDING)
        self._is_token = part != _PADDING
        order = torch.arange(part.shape[1], device=device)
        visible = (order <= order[:, None]) & (
            (part[:, None] == _PREFIX) | (part[:, None] == part[:, :, None])
        )
        self._visible = F.pad(visible, (shared, 0), value=True)
        position = padded(positions)
        header = torch.arange(shared, device=device).expand(len(prompts), -1)
        self._distance = position[:, :, None] - torch.cat((header, position), dim=1)[:, None]

    def mass(self, query: Tensor, key: Tensor, window: int | None) -> Tensor:
        """Return the calibrated mass of each head on each document, [prompts, heads]."""
        prompts = torch.arange(len(self._rows), device=query.device)[:, None]
        logits = self._logits(query, key, self._columns[prompts, self._rows]).float()
        seen = self._seen(window)[prompts, self._rows][:, None, None]
        attention = logits.masked_fill(~seen, float("-inf")).softmax(dim=-1)
        mass = attention.flatten(1, 3) @ self._span[:, :, None]
        mass = mass.view(attention.shape[:-1]) * self._average[:, None, None]
        return mass.sum(dim=-1).flatten(1)

    def outputs(self, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
        """Return the attention output of the tokens that are not shared, [heads, tokens, size]."""
        logits = self._logits(query, key, self._columns)
        hidden = ~self._seen(window)[:, None, None]
        attention = logits.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        outputs = attention.flatten(2, 3) @ self._own(value)
        outputs = outputs.view(*attention.shape[:4], -1).flatten(1, 2)
        return outputs.transpose(1, 2)[self._is_token].transpose(0, 1)

    def _logits(self, query: Tensor, key: Tensor, columns: Tensor) -> Tensor:
        """Return the attention logits, [prompts, key heads, heads of each, rows, keys]."""
        rows = query[:, columns].view(len(key), -1, *columns.shape, query.shape[-1])
        rows = rows.permute(2, 0, 1, 3, 4)
        logits: Tensor = rows.flatten(2, 3) @ self._own(key).transpose(2, 3)
        return logits.view(*rows.shape[:4], -1)

    def _seen(self, window: int | None) -> Tensor:
        """Return which keys each row sees, [prompts, rows, keys]."""
        return self._visible if window is None else self._visible & (self._distance < window)

    def _own(self, states: Tensor) -> Tensor:
        """Return keys or values of each prompt, [prompts, key heads, tokens, size]."""
        shared = states[:, : self._shared].expand(len(self._columns), -1, -1, -1)
        return torch.cat((shared, states[:, self._columns].transpose(0, 1)), dim=2)


def calibrated_masses(model: PreTrainedModel, prompts: Sequence[Window], layers: int) -> Tensor:
    """Compute the calibrated mass of every head on the document of each prompt.

    Args:
        model: A decoder with the attention function of the Transformers backend.
        prompts: Prompts of one document each.
        layers: Number of layers of the model.

    Returns:
        Float32, shape [prompts, layers * heads].

    Raises:
        UnsupportedModelError: The attention of the model cannot be read.
    """
    packed = PackedPrompts(prompts, layers, model.device)
    try:
        model(
            input_ids=packed.tokens[None],
            position_ids=packed.positions[None],
            use_cache=False,
            core_sequence=packed,
        )
    except LastHeadReached:
        return packed.masses().flatten(1)
    raise UnsupportedModelError(f"{type(model).__name__} never called attention in its last layer")


def _shared_length(prompts: Sequence[PromptParts]) -> int:
    """Return the number of tokens before the documents that all prompts have in common."""
    shared = min(prompt.document.start for prompt in prompts)
    first = prompts[0].context
    while any(not np.array_equal(prompt.context[:shared], first[:shared]) for prompt in prompts):
        shared -= 1
    return shared
