"""A request's attention, summed over its query span while the chunks of its prefill go by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core_rerank_integrations.backends.vllm.request import (
    COLUMNS_KEY,
    FIRST_ROW_KEY,
    PER_HEAD_KEY,
    SELF_TEST_KEY,
)
from core_rerank_integrations.backends.vllm.worker.probe import Probes, Rows


class AttentionSum:
    """Attention mass of one request, over this rank's heads and the rows seen so far.

    Args:
        options: What came with the request.
        heads: Number of heads in the head set, over all ranks.
        length: Tokens of its prompt.
        device: Where the probes compute.
    """

    def __init__(
        self, options: Mapping[str, Any], heads: int, length: int, device: torch.device
    ) -> None:
        self.length = length
        self.self_test: bool = options.get(SELF_TEST_KEY, False)
        self._per_head: bool = options.get(PER_HEAD_KEY, False)
        columns: int = options[COLUMNS_KEY]
        size = (heads if self._per_head else 1) * columns
        self._sum = torch.zeros(1 if self.self_test else size, device=device)
        self._mass = self._sum.view(-1, 1 if self.self_test else columns)
        self._next_row: int = options[FIRST_ROW_KEY]
        self._rows = 0

    def rows(self, begin: int, end: int) -> range:
        """Which of the request's tokens ``begin … end - 1``, which a step computed, count.

        A row that was seen before, in a request that was preempted and begun anew, is not
        counted twice.
        """
        return range(max(self._next_row, begin), end)

    def add(self, rows: range, attention: Tensor, probes: Probes) -> None:
        """Add the attention of ``rows``, shape [local heads, tokens]."""
        attention = attention[:, : self._mass.shape[1]]
        told = self._mass[:, : attention.shape[1]]  # Rows of an opening see no more than itself.
        if self._per_head:
            told[probes.places] += attention
        else:
            told[0] += probes.weights @ attention
        self._rows += len(rows)
        self._next_row = rows.stop

    def test(self, error: float) -> None:
        """Keep what a self-test found."""
        self._sum.fill_(error)
        self._rows = 1

    def vector(self) -> Tensor:
        """Float32 [heads or 1 * columns + 1]: the sums, then the number of rows.

        Sums of several tensor parallel ranks add up; the number of rows is the same on each.
        For a self-test, float32 [2]: the probes' largest error, and 1; or zeros, if the prompt
        was split over steps.
        """
        # The number is filled in on the device: a copy from the host would wait for its turn.
        return torch.cat((self._sum, self._sum.new_full((1,), self._rows)))


class StepPart(NamedTuple):
    """What a step computed of one request."""

    request: int
    """The request's place in the step's batch."""
    first_token: int
    """Place of its first token in the step's batch of tokens."""
    begin: int
    """Index of that token in the request."""
    end: int
    """Index after its last token of this step."""
    sum: AttentionSum


def add_step(probes: Probes, parts: Sequence[StepPart]) -> None:
    """Add to each request's sum what the probes have seen in a step.

    Rows whose queries no probe has seen are not counted at all.
    """
    if not probes.ready:
        return
    asked: list[tuple[StepPart, range]] = []
    taken: list[Rows] = []
    for part in parts:
        counted = part.sum.rows(part.begin, part.end)
        first = part.first_token + counted.start - part.begin
        rows = Rows(part.request, first, len(counted), part.end)
        if part.sum.self_test:
            if len(counted) == part.sum.length:  # Else the step holds a part, which tells nothing.
                part.sum.test(probes.error(rows))
        elif counted:
            asked.append((part, counted))
            taken.append(rows)
    for (part, counted), attention in zip(asked, probes.attention(taken), strict=True):
        part.sum.add(counted, attention, probes)
