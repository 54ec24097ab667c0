"""Attention mass as the output of a vLLM pooling model."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.tasks import PoolingTask

from core_rerank_integrations.backends.vllm.request import rerank_options
from core_rerank_integrations.backends.vllm.worker.attention_sum import (
    AttentionSum,
    StepPart,
    add_step,
)
from core_rerank_integrations.backends.vllm.worker.probe import Probes

TASK: PoolingTask = "token_classify"
"""A task that both of vLLM's model runners accept; its own meaning plays no part here."""


class CoRePooler(Pooler):  # type: ignore[misc]
    """Sums the probes' attention mass over a request's query span, chunk by chunk.

    A request yields what `AttentionSum.vector` describes, for the caller's side to check.
    """

    def __init__(self, probes: Probes, heads: int) -> None:
        super().__init__()
        self._probes = probes
        self._heads = heads

    def get_supported_tasks(self) -> Set[PoolingTask]:
        """The one task."""
        return {TASK}

    def forward(self, hidden_states: Tensor, pooling_metadata: Any) -> list[Tensor]:
        """Called after every step, with all requests of its batch."""
        cursor = pooling_metadata.get_pooling_cursor()
        device = hidden_states.device
        parts: list[StepPart] = []
        nothing = torch.zeros(1, device=device)
        outputs = [nothing] * len(pooling_metadata.pooling_params)
        first_token = 0
        for request, (parameters, state, scheduled, end, length) in enumerate(
            zip(
                pooling_metadata.pooling_params,
                pooling_metadata.pooling_states,
                cursor.num_scheduled_tokens_cpu.tolist(),
                cursor.seq_lens_cpu.tolist(),
                cursor.prompt_lens_cpu.tolist(),
                strict=True,
            )
        ):
            options = rerank_options(parameters)
            if options is not None:  # Else one of vLLM's own dummy requests.
                if not hasattr(state, "core_rerank"):
                    state.core_rerank = AttentionSum(options, self._heads, length, device)
                parts.append(
                    StepPart(request, first_token, end - scheduled, end, state.core_rerank)
                )
            first_token += scheduled
        add_step(self._probes, parts)
        self._probes.forget()
        for part in parts:
            if part.end == part.sum.length:  # Nobody reads the others'.
                outputs[part.request] = _reduced(part.sum.vector())
        return outputs


def _reduced(vector: Tensor) -> Tensor:
    if get_tensor_model_parallel_world_size() > 1:
        rows = vector[-1].clone()
        vector = tensor_model_parallel_all_reduce(vector)
        vector[-1] = rows
    return vector
