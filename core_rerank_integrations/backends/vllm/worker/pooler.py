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

from core_rerank_integrations.backends.vllm.request import RequestOptions
from core_rerank_integrations.backends.vllm.worker.attention_sum import AttentionSum, add_step
from core_rerank_integrations.backends.vllm.worker.probe import Probes
from core_rerank_integrations.heads.head_set import HeadSet

TASK: PoolingTask = "token_classify"
"""A task that both of vLLM's model runners accept. Its own meaning does not matter here."""


class CoRePooler(Pooler):  # type: ignore[misc]
    """Return each request's `AttentionSum.vector` as its output."""

    def __init__(self, vllm_config: Any, head_set: HeadSet) -> None:
        super().__init__()
        self._probes = Probes(vllm_config, head_set, stop_after_last=True)
        self._heads = len(head_set.heads)

    def get_supported_tasks(self) -> Set[PoolingTask]:
        """Return `TASK`."""
        return {TASK}

    def forward(self, hidden_states: Tensor, pooling_metadata: Any) -> list[Tensor]:
        """Process a step; vLLM calls this after each, with all requests of its batch."""
        cursor = pooling_metadata.get_pooling_cursor()
        device = hidden_states.device
        batch: list[tuple[AttentionSum | None, int, int]] = []
        for parameters, state, scheduled, end, length in zip(
            pooling_metadata.pooling_params,
            pooling_metadata.pooling_states,
            cursor.num_scheduled_tokens_cpu.tolist(),
            cursor.seq_lens_cpu.tolist(),
            cursor.prompt_lens_cpu.tolist(),
            strict=True,
        ):
            options = RequestOptions.of(parameters)
            if options is not None and not hasattr(state, "core_rerank"):
                state.core_rerank = AttentionSum(options, self._heads, length, device)
            # None for vLLM's own dummy requests.
            batch.append((getattr(state, "core_rerank", None), end - scheduled, end))
        add_step(self._probes, batch)
        unfinished = torch.zeros(1, device=device)
        return [
            _reduced(item.vector()) if item is not None and item.is_complete else unfinished
            for item, _, _ in batch
        ]


def _reduced(vector: Tensor) -> Tensor:
    """Sum a vector over tensor parallel ranks, except for the number of rows."""
    if get_tensor_model_parallel_world_size() > 1:
        rows = vector[-1].clone()
        vector = tensor_model_parallel_all_reduce(vector)
        vector[-1] = rows
    return vector
