"""A request's attention, summed over its query span while the chunks of its prefill go by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from core_rerank_integrations.backends.vllm.probe import Probe
from core_rerank_integrations.backends.vllm.request import (
    PER_HEAD_KEY,
    QUERY_START_KEY,
    SELF_TEST_KEY,
)


class AttentionSum:
    """Attention mass of one request, over this rank's heads and the rows seen so far.

    Args:
        options: What came with the request.
        heads: Number of heads in the head set, over all ranks.
        device: Where the probes compute.
    """

    def __init__(self, options: Mapping[str, Any], heads: int, device: torch.device) -> None:
        start: int = options[QUERY_START_KEY]
        self._per_head: bool = options.get(PER_HEAD_KEY, False)
        self._mass = torch.zeros(heads if self._per_head else 1, start + 1, device=device)
        self._next_row = start
        self._rows = 0
        self._self_test: bool = options.get(SELF_TEST_KEY, False)
        self._errors: list[float] = []

    def add(
        self, probes: Sequence[Probe], request: int, first_token: int, begin: int, end: int
    ) -> None:
        """Add the query rows among the tokens that a step computed.

        A row that was seen before, in a request that was preempted and begun anew, is not
        counted twice; one whose queries no probe has seen is not counted at all.

        Args:
            probes: The probes, which have just seen the step.
            request: The request's place in the step's batch.
            first_token: Place of the request's first token in the step's batch of tokens.
            begin: Index of that token in the request.
            end: Index after its last token of this step.
        """
        first_row = max(self._next_row, begin)
        if first_row >= end or not all(probe.ready for probe in probes):
            return
        if self._self_test:
            self._errors = [
                probe.error(request, range(first_token, first_token + end)) for probe in probes
            ]
            for probe in probes:
                probe.is_tested = True
            return
        rows = range(first_token + first_row - begin, first_token + end - begin)
        for probe in probes:
            attention = probe.attention(request, rows, end)[:, : self._mass.shape[1]]
            if self._per_head:
                self._mass[probe.places] += attention
            else:
                self._mass[0] += probe.weights @ attention
        self._rows += len(rows)
        self._next_row = end

    def vector(self) -> Tensor:
        """Float32 [heads or 1 * (prefix tokens + 1) + 1]: the sums, then the number of rows.

        Sums of several tensor parallel ranks add up; the number of rows is the same on each.
        For a self-test, float32 [2]: the largest of the probes' errors, and 0.
        """
        if self._self_test:
            return self._mass.new_tensor([max(self._errors, default=float("inf")), 0.0])
        return torch.cat((self._mass.flatten(), self._mass.new_tensor([self._rows])))
