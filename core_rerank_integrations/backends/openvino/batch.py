"""Prefixes and questions as the inputs of the graph, and its outputs as attention mass.

A row of the batch is one prefix. Its new tokens are the prefix, unless it is cached, and then each
of its questions. Questions do not see each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from core_rerank_integrations.backends.openvino.decoder import Decoder
from core_rerank_integrations.method.prompt import TokenIds
from core_rerank_integrations.method.scoring import Mass

HIDDEN = -1e30
"""Added to the logits of hidden tokens. It is finite, so that rows of padding stay numbers."""
CACHED_LENGTH_STEP = 32
"""Cached lengths are rounded up to multiples of this. The graph prepares itself for each new shape
in about thirty milliseconds; a few more columns cost almost nothing."""


States = list[npt.NDArray[Any]]
"""Keys and values of the layers in turn, float32, [2 layers - 1, key heads, tokens, head size].
Where they are rounded: the same in int8, and their scales, float32, with 1 as the last size."""


class Row(NamedTuple):
    """One prefix of a batch.

    Attributes:
        cached: Keys and values before the new tokens (see `States`).
        prefix: New tokens of the prefix that follow them, shape [tokens].
        instruction_rows: Number of tokens at the end of ``prefix`` that are query rows.
        questions: New tokens of each question.
    """

    cached: States
    prefix: TokenIds
    instruction_rows: int
    questions: Sequence[TokenIds]

    @property
    def cached_tokens(self) -> int:
        """Number of cached tokens."""
        return int(self.cached[0].shape[2])

    @property
    def new_tokens(self) -> int:
        """Number of new tokens."""
        return len(self.prefix) + sum(map(len, self.questions))

    @property
    def question_spans(self) -> list[tuple[int, int]]:
        """Start and stop of each question among the new tokens."""
        ends = len(self.prefix) + np.cumsum([len(question) for question in self.questions])
        return [
            (int(end) - len(question), int(end))
            for question, end in zip(self.questions, ends, strict=True)
        ]


class Answer(NamedTuple):
    """The graph's outputs for one row.

    Attributes:
        instruction_mass: Attention of the instruction rows, summed, shape
            [heads, cached and prefix tokens].
        question_masses: Attention of the rows of each question, summed, each of shape
            [heads, cached, prefix and question tokens].
        states: Keys and values of the prefix.
    """

    instruction_mass: Mass
    question_masses: list[Mass]
    states: States


class Workspace:
    """Memory that is reused from pass to pass, because fresh pages cost more than the copying."""

    def __init__(self) -> None:
        self._memory: dict[np.dtype[Any], npt.NDArray[Any]] = {}

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Return an uninitialised array; this invalidates the previous one of this dtype."""
        size = math.prod(shape)
        if dtype not in self._memory or size > len(self._memory[dtype]):
            self._memory[dtype] = np.zeros(size, dtype)
        return self._memory[dtype][:size].reshape(shape)


class Batch:
    """Rows of one pass, padded to the same length.

    Args:
        decoder: Shape of the model.
        rows: The rows.
    """

    def __init__(self, decoder: Decoder, rows: Sequence[Row]) -> None:
        self._decoder = decoder
        self._rows = rows
        longest = max(row.cached_tokens for row in rows)
        self._cached = -(-longest // CACHED_LENGTH_STEP) * CACHED_LENGTH_STEP
        self._new = max(row.new_tokens for row in rows)
        self._query_rows = max(
            row.instruction_rows + row.new_tokens - len(row.prefix) for row in rows
        )

    def inputs(self, workspace: Workspace) -> list[npt.NDArray[Any]]:
        """Return the inputs in the order of `graph.Inputs`."""
        decoder, count = self._decoder, len(self._rows)
        sums = 1 + max(len(row.questions) for row in self._rows)
        tokens = np.zeros((count, self._new), dtype=np.int64)
        positions = np.zeros((count, self._new), dtype=np.int64)
        query_rows = np.zeros((count, self._query_rows), dtype=np.int64)
        row_weights = np.zeros((count, sums, self._query_rows), dtype=np.float32)
        cached = [
            workspace.array(
                (len(part), count, decoder.key_heads, self._cached, part.shape[-1]), part.dtype
            )
            for part in self._rows[0].cached
        ]
        masks = {
            window: np.full((count, self._new, self._cached + self._new), HIDDEN, dtype=np.float32)
            for window in dict.fromkeys(decoder.windows)
        }
        for index, row in enumerate(self._rows):
            border = row.cached_tokens
            for padded, part in zip(cached, row.cached, strict=True):
                padded[:, index, :, :border] = part
                padded[:, index, :, border:] = 0
            pieces = [row.prefix, *row.questions]
            tokens[index, : row.new_tokens] = np.concatenate(pieces)
            starts = [border, *(border + len(row.prefix) for _ in row.questions)]
            positions[index, : row.new_tokens] = np.concatenate(
                [
                    np.arange(start, start + len(piece))
                    for start, piece in zip(starts, pieces, strict=True)
                ]
            )
            first_row = len(row.prefix) - row.instruction_rows
            query_rows[index, : row.new_tokens - first_row] = np.arange(first_row, row.new_tokens)
            row_weights[index, 0, : row.instruction_rows] = 1
            for number, (start, stop) in enumerate(row.question_spans, start=1):
                row_weights[index, number, start - first_row : stop - first_row] = 1
            for window, mask in masks.items():
                self._unmask(mask[index], positions[index], row, window)
        rotary = [
            part for rotary in dict.fromkeys(decoder.rotaries) for part in rotary.cos_sin(positions)
        ]
        return [tokens, *masks.values(), *rotary, query_rows, row_weights, *chain(*cached)]

    def answers(self, outputs: Sequence[npt.NDArray[Any]]) -> list[Answer]:
        """Divide the graph's outputs into rows."""
        mass, *states = outputs
        per_part = 2 * self._decoder.layers - 1
        parts = [states[i : i + per_part] for i in range(0, len(states), per_part)]
        answers = []
        for index, row in enumerate(self._rows):
            border, length = row.cached_tokens, len(row.prefix)
            before = np.concatenate(
                (
                    mass[index, :, :, :border],
                    mass[index, :, :, self._cached : self._cached + length],
                ),
                axis=-1,
            )
            questions = [
                np.concatenate(
                    (
                        before[:, number],
                        mass[index, :, number, self._cached + start : self._cached + stop],
                    ),
                    axis=-1,
                )
                for number, (start, stop) in enumerate(row.question_spans, start=1)
            ]
            new_states = [np.stack([state[index, :, :length] for state in part]) for part in parts]
            answers.append(Answer(before[:, 0].copy(), questions, new_states))
        return answers

    def _unmask(
        self, mask: npt.NDArray[np.float32], positions: TokenIds, row: Row, window: int | None
    ) -> None:
        """Set the mask of a row to 0 where a new token sees another token."""
        before, cached = self._cached, row.cached_tokens
        column_positions = np.concatenate((np.arange(cached), positions[: row.new_tokens]))
        columns = np.concatenate((np.arange(cached), before + np.arange(row.new_tokens)))
        for start, stop in [(0, len(row.prefix)), *row.question_spans]:
            seen = np.zeros(len(columns), dtype=bool)
            seen[: cached + len(row.prefix)] = True
            seen[cached + start : cached + stop] = True
            own = positions[start:stop, None]
            visible = seen & (column_positions <= own)
            if window is not None:
                visible &= column_positions > own - window
            part = mask[start:stop]
            part[:, columns] = np.where(visible, 0, HIDDEN)
        # A padding row that sees nothing would attend to all tokens equally.
        padding = np.arange(row.new_tokens, self._new)
        mask[padding, before + padding] = 0
