"""Prefixes and questions as one sequence without padding, and the attention read from it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface

from core_rerank_integrations.backends.local.backend import PrefixRun
from core_rerank_integrations.backends.local.prefix_cache import CachedPrefix
from core_rerank_integrations.backends.transformers.attention import (
    LayerHeads,
    attention_sums,
    causal_attention,
    from_stored,
    question_attention,
    to_stored,
)
from core_rerank_integrations.backends.transformers.checks import check_arguments
from core_rerank_integrations.errors import UnsupportedModelError
from core_rerank_integrations.method.scoring import Mass

ATTENTION_NAME = "core_rerank"


class LastHeadReached(Exception):  # noqa: N818  This is not an error.
    """Ends the forward pass: nothing after the highest head's queries and keys is needed."""


class PackedRun:
    """A run inside the packed sequence: its prefix, unless it is cached, then its questions.

    Args:
        start: Index of its first token in the sequence.
        run: The prefix and its questions.
        heads: Number of selected heads.
        keep: Whether to keep keys and values.
        device: Device of the tensors.
    """

    def __init__(
        self, start: int, run: PrefixRun, heads: int, keep: bool, device: torch.device
    ) -> None:
        length = len(run.prefix.ids)
        self.start = start
        self.is_new = run.cached is None
        self.keep = keep
        self.instruction_rows = run.prefix.instruction_length
        # Another thread that loads a model changes PyTorch's default dtype meanwhile.
        zeros = partial(torch.zeros, dtype=torch.float32, device=device)
        self.cached = run.cached or CachedPrefix(zeros(heads, length))
        self.border = start + (length if self.is_new else 0)
        self.stop = self.border
        self.questions: list[tuple[int, int]] = []
        self.sums: list[Tensor] = []
        for question in run.questions:
            self.questions.append((self.stop, self.stop + len(question)))
            self.sums.append(zeros(heads, length + len(question)))
            self.stop += len(question)

    def masses(self) -> list[Mass]:
        """Return the mean attention of the query span for each question, [heads, tokens]."""
        masses = []
        for (start, stop), sums in zip(self.questions, self.sums, strict=True):
            sums[:, : self.cached.instruction_mass.shape[1]] += self.cached.instruction_mass
            masses.append((sums / (self.instruction_rows + stop - start)).cpu().numpy())
        return masses


class AttendingSequence(Protocol):
    """What computes and reads the attention of a forward pass; see `PackedSequence.attend`."""

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
        """Compute the attention output of a layer."""
        ...


class PackedSequence:
    """The tokens of one forward pass; collects attention while the pass runs.

    Args:
        runs: The prefixes and questions.
        heads: Selected heads by layer.
        keep: Whether to keep keys and values.
        rounds_states: Whether keys and values are rounded to eight bits before any token attends
            to them, so that new and cached ones are the same.
        device: Device of the model.
    """

    def __init__(
        self,
        runs: Sequence[PrefixRun],
        heads: dict[int, LayerHeads],
        keep: bool,
        rounds_states: bool,
        device: torch.device,
    ) -> None:
        count = sum(len(layer.heads) for layer in heads.values())
        tokens: list[Any] = []
        positions: list[Any] = []
        self.runs: list[PackedRun] = []
        start = 0
        for run in runs:
            packed = PackedRun(start, run, count, keep, device)
            self.runs.append(packed)
            start = packed.stop
            length = len(run.prefix.ids)
            if packed.is_new:
                tokens.append(run.prefix.ids)
                positions.append(np.arange(length))
            tokens += run.questions
            positions += (np.arange(length, length + len(ids)) for ids in run.questions)
        self.tokens = torch.as_tensor(np.concatenate(tokens), device=device)
        self.positions = torch.as_tensor(np.concatenate(positions), device=device)
        self._heads = heads
        self._rounds_states = rounds_states
        self._last_layer = max(heads)

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
        """Compute the attention output of a layer, and collect its attention mass.

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
            LastHeadReached: This is the last layer that is needed.
        """
        heads = self._heads.get(layer)
        is_last = layer == self._last_layer
        output = None if is_last else query.new_empty(*query.shape[:2], value.shape[-1])
        stored = [to_stored(state, self._rounds_states) for state in (key, value)]
        key, value = (from_stored(parts, query.dtype) for parts in stored)
        for run in self.runs:
            start, border, cached = run.start, run.border, run.cached
            if run.is_new:
                keys, values, own = (
                    key[:, start:border],
                    value[:, start:border],
                    query[:, start:border],
                )
                if heads is not None and run.instruction_rows:
                    cached.instruction_mass[heads.indices] = attention_sums(
                        own[:, -run.instruction_rows :], keys, heads, scale=scale, window=window
                    )
                if output is not None:
                    output[:, start:border] = causal_attention(
                        own, keys, values, scale=scale, window=window
                    )
                if run.keep:  # Copies, because the pass's own tensors hold all runs.
                    for parts in stored[: 1 if is_last else 2]:
                        cached.states += [part[:, start:border].clone() for part in parts]
            else:
                keys = self._cached(cached, 2 * layer, query.dtype)
                values = value if is_last else self._cached(cached, 2 * layer + 1, query.dtype)
            for question, (begin, stop) in enumerate(run.questions):
                outputs, sums = question_attention(
                    query[:, begin:stop],
                    (keys, key[:, begin:stop]),
                    None if is_last else (values, value[:, begin:stop]),
                    heads,
                    scale=scale,
                    window=window,
                )
                if output is not None and outputs is not None:
                    output[:, begin:stop] = outputs
                if heads is not None and sums is not None:
                    run.sums[question][heads.indices] = sums
        if output is None:
            raise LastHeadReached
        return output

    def _cached(self, cached: CachedPrefix, index: int, dtype: torch.dtype) -> Tensor:
        """Return the keys (even index) or values of a layer of a cached prefix."""
        parts = 2 if self._rounds_states else 1
        return from_stored(cached.states[index * parts : (index + 1) * parts], dtype)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001  Part of the interface; zero in evaluation.
    sliding_window: int | None = None,
    core_sequence: AttendingSequence | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Implement Transformers' attention interface; tensors are [batch, heads, tokens, size].

    Raises:
        UnsupportedModelError: The attention of the model cannot be read.
    """
    model = type(module).__name__
    if core_sequence is None:
        raise UnsupportedModelError(f"{model} does not pass keyword arguments to its attention")
    check_arguments(model, {**kwargs, "attention_mask": attention_mask})
    output = core_sequence.attend(
        int(module.layer_idx),  # type: ignore[arg-type]
        query[0],
        key[0],
        value[0],
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
    )
    return output.transpose(0, 1)[None], None


# No mask function is registered under this name, so Transformers makes no masks. A model that
# makes its own is refused above.
AttentionInterface.register(ATTENTION_NAME, packed_attention)
