"""Documents and their questions as the inputs of the graph, and its output as attention mass.

A row of the batch is a document. Its new tokens are its opening, if that is not known, and then
each of its questions, none of which sees another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from core_rerank_integrations.backends.openvino.decoder import Decoder
from core_rerank_integrations.prompt import TokenIds
from core_rerank_integrations.scoring import Mass

HIDDEN = -1e30
"""Logit of what a token does not see: finite, so that rows of padding stay numbers."""
STEP = 32
"""The length of what is known is rounded up to multiples of this: the graph prepares itself for
each new shape, some thirty milliseconds, where a few more columns cost next to nothing."""


class Row(NamedTuple):
    """A document of a batch.

    Attributes:
        known: Of what comes before the new tokens, the keys and values, [2 layers - 1, key heads,
            known tokens, head size].
        opening: New tokens that follow it.
        opening_rows: How many of these, at the end, are asked what they attend to.
        questions: New tokens that follow the opening, each question for itself.
    """

    known: npt.NDArray[Any]
    opening: TokenIds
    opening_rows: int
    questions: Sequence[TokenIds]

    @property
    def known_tokens(self) -> int:
        """How many."""
        return int(self.known.shape[2])

    @property
    def new_tokens(self) -> int:
        """How many."""
        return len(self.opening) + sum(map(len, self.questions))


class Answer(NamedTuple):
    """What the graph says about a row.

    Attributes:
        opening_mass: Attention of the opening's rows, summed, [heads, known and opening tokens].
        question_masses: The same of each question, [heads, known, opening and question tokens].
        states: Keys and values of the opening, [2 layers - 1, key heads, tokens, head size].
    """

    opening_mass: Mass
    question_masses: list[Mass]
    states: npt.NDArray[Any]


class Workspace:
    """Memory that is used again from pass to pass: fresh pages would cost more than the copying."""

    def __init__(self) -> None:
        self._memory = np.zeros(0, dtype=np.uint8)

    def array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array of any content; it ends the life of the one before."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size > len(self._memory):
            self._memory = np.zeros(size, dtype=np.uint8)
        return self._memory[:size].view(dtype).reshape(shape)


class Batch:
    """Rows beside each other, padded to one length.

    Args:
        decoder: What runs over them.
        rows: The documents.
    """

    def __init__(self, decoder: Decoder, rows: Sequence[Row]) -> None:
        self._decoder = decoder
        self._rows = rows
        self._before = -(-max(row.known_tokens for row in rows) // STEP) * STEP
        self._new = max(row.new_tokens for row in rows)
        self._asking = max(row.opening_rows + row.new_tokens - len(row.opening) for row in rows)

    def inputs(self, workspace: Workspace) -> list[npt.NDArray[Any]]:
        """In the order of `graph.Inputs`."""
        count, before, new = len(self._rows), self._before, self._new
        groups = 1 + max(len(row.questions) for row in self._rows)
        tokens = np.zeros((count, new), dtype=np.int64)
        positions = np.zeros((count, new), dtype=np.int64)
        asking = np.zeros((count, self._asking), dtype=np.int64)
        shares = np.zeros((count, groups, self._asking), dtype=np.float32)
        decoder = self._decoder
        known = workspace.array(
            (2 * decoder.layers - 1, count, decoder.key_heads, before, decoder.head_size),
            self._rows[0].known.dtype,
        )
        masks = {
            window: np.full((count, new, before + new), HIDDEN, dtype=np.float32)
            for window in dict.fromkeys(decoder.windows)
        }
        for place, row in enumerate(self._rows):
            begin = row.known_tokens
            known[:, place, :, :begin] = row.known
            known[:, place, :, begin:] = 0
            pieces = [row.opening, *row.questions]
            tokens[place, : row.new_tokens] = np.concatenate(pieces)
            starts = [begin, *(begin + len(row.opening) for _ in row.questions)]
            positions[place, : row.new_tokens] = np.concatenate(
                [
                    np.arange(start, start + len(piece))
                    for start, piece in zip(starts, pieces, strict=True)
                ]
            )
            asked = len(row.opening) - row.opening_rows
            asking[place, : row.new_tokens - asked] = np.arange(asked, row.new_tokens)
            shares[place, 0, : row.opening_rows] = 1
            for group, (first, last) in enumerate(self._questions(row), start=1):
                shares[place, group, first - asked : last - asked] = 1
            for window, mask in masks.items():
                self._show(mask[place], positions[place], row, window)
        turns = [
            part for rotary in dict.fromkeys(decoder.rotaries) for part in rotary.cos_sin(positions)
        ]
        return [tokens, *masks.values(), *turns, asking, shares, *known]

    def answers(self, outputs: Sequence[npt.NDArray[Any]]) -> list[Answer]:
        """Per row, from the graph's outputs."""
        mass, *states = outputs
        answers = []
        for place, row in enumerate(self._rows):
            border, own = row.known_tokens, self._before + len(row.opening)
            shared = [mass[place, :, :, :border], mass[place, :, :, self._before : own]]
            before = np.concatenate(shared, axis=-1)
            questions = [
                np.concatenate(
                    (
                        before[:, group],
                        mass[place, :, group, self._before + first : self._before + last],
                    ),
                    axis=-1,
                )
                for group, (first, last) in enumerate(self._questions(row), start=1)
            ]
            length = len(row.opening)
            kept = [state[place, :, :length] for state in states] if length else []
            answers.append(
                Answer(
                    before[:, 0].copy(), questions, np.stack(kept) if kept else row.known[:, :, :0]
                )
            )
        return answers

    def _questions(self, row: Row) -> list[tuple[int, int]]:
        """Where each question lies among the new tokens."""
        ends = len(row.opening) + np.cumsum([len(question) for question in row.questions])
        return [
            (int(end) - len(question), int(end))
            for question, end in zip(row.questions, ends, strict=True)
        ]

    def _show(
        self, mask: npt.NDArray[np.float32], positions: TokenIds, row: Row, window: int | None
    ) -> None:
        """Uncover what each new token sees."""
        before, known = self._before, row.known_tokens
        columns = np.concatenate((np.arange(known), positions[: row.new_tokens]))
        places = np.concatenate((np.arange(known), before + np.arange(row.new_tokens)))
        pieces = [(0, len(row.opening)), *self._questions(row)]
        for start, stop in pieces:
            seen = np.zeros(len(columns), dtype=bool)
            seen[: known + len(row.opening)] = True
            seen[known + start : known + stop] = True
            own = positions[start:stop, None]
            visible = seen & (columns <= own)
            if window is not None:
                visible &= columns > own - window
            part = mask[start:stop]
            part[:, places] = np.where(visible, 0, HIDDEN)
        # A row of padding that saw nothing would be the mean of everything.
        padding = np.arange(row.new_tokens, self._new)
        mask[padding, before + padding] = 0
