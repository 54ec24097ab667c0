"""Attention mass as the output of a vLLM pooling model."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.tasks import PoolingTask

from core_rerank_integrations.backends.vllm.probe import Probe
from core_rerank_integrations.backends.vllm.request import query_start

TASK: PoolingTask = "token_classify"
"""A task that both of vLLM's model runners accept; its own meaning plays no part here."""


@dataclass
class _Partial:
    """What is known of a request after some chunks of its prefill."""

    mass: Tensor
    next_row: int
    rows: int = 0


class CoRePooler(Pooler):  # type: ignore[misc]
    """Sums the probes' attention mass over a request's query span, chunk by chunk.

    A request yields float32 [prefix tokens + 2]: the summed mass on the prefix and on the query
    span's first token, then the number of rows in the sum, for the engine side to check.
    """

    def __init__(self, probes: Sequence[Probe]) -> None:
        super().__init__()
        self._probes = probes

    def get_supported_tasks(self) -> Set[PoolingTask]:
        """The one task."""
        return {TASK}

    def forward(self, hidden_states: Tensor, pooling_metadata: Any) -> list[Tensor]:
        """Called after every step, with all requests of its batch."""
        cursor = pooling_metadata.get_pooling_cursor()
        outputs = []
        first_token = 0
        for request, (parameters, state, scheduled, end, prompt_length) in enumerate(
            zip(
                pooling_metadata.pooling_params,
                pooling_metadata.pooling_states,
                cursor.num_scheduled_tokens_cpu.tolist(),
                cursor.seq_lens_cpu.tolist(),
                cursor.prompt_lens_cpu.tolist(),
                strict=True,
            )
        ):
            start = query_start(parameters)
            if start is None:  # vLLM's own dummy requests.
                outputs.append(torch.zeros(1, device=hidden_states.device))
            else:
                partial = self._partial(state, start, hidden_states.device)
                self._add(partial, request, first_token, end - scheduled, end)
                outputs.append(self._output(partial, finished=end == prompt_length))
            first_token += scheduled
        return outputs

    def _partial(self, state: Any, start: int, device: torch.device) -> _Partial:
        if not hasattr(state, "core_rerank"):
            state.core_rerank = _Partial(torch.zeros(start + 1, device=device), start)
        partial: _Partial = state.core_rerank
        return partial

    def _add(self, partial: _Partial, request: int, first_token: int, begin: int, end: int) -> None:
        """Add the query rows among tokens ``begin`` to ``end - 1`` of a request."""
        first_row = max(partial.next_row, begin)
        if first_row >= end:
            return
        rows = range(first_token + first_row - begin, first_token + end - begin)
        for probe in self._probes:
            partial.mass += probe.mass(request, rows, end)[: len(partial.mass)]
        partial.rows += len(rows)
        partial.next_row = end

    def _output(self, partial: _Partial, finished: bool) -> Tensor:
        mass = partial.mass
        if finished and get_tensor_model_parallel_world_size() > 1:
            mass = tensor_model_parallel_all_reduce(mass)
        return torch.cat((mass, mass.new_tensor([partial.rows])))
