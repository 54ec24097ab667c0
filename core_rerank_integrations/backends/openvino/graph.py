"""A decoder as an OpenVINO model that returns attention mass instead of logits.

A row of a batch is one prefix: its new tokens after its cached ones. Everything that depends on
lengths (positions, masks, query rows) is an input, so the graph has no mask logic of its own, and
one graph serves new and cached documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from core_rerank_integrations.backends.openvino.decoder import Decoder, Rotary
from core_rerank_integrations.backends.openvino.runtime import Model, Node, PartialShape, Type, ops
from core_rerank_integrations.backends.openvino.weights import Weights

MAX_CODE = 126
"""Largest of the eight-bit codes. Scales lose up to 1/128 in bfloat16, which makes it 127."""
MIN_SCALE = 1e-30
"""Scale of keys and values that are all zero."""


class Inputs(NamedTuple):
    """Inputs for B rows, T new tokens, P cached tokens, S = P + T.

    Attributes:
        tokens: Token ids, [B, T], int64.
        mask: For each distinct sliding window, the values that are added to logits, [B, T, S].
        rotary: For each distinct rotary embedding, its cosines and its sines, each
            [B, T, head size].
        query_rows: Indices of the new tokens whose attention is read, [B, R], int64.
        row_weights: Weight of each query row in each of G sums, [B, G, R].
        cached: Keys and values of each layer in turn, each [B, key heads, P, head size], as
            they are multiplied. There are no values for the last layer.
    """

    tokens: Node
    mask: dict[int | None, Node]
    rotary: dict[Rotary, tuple[Node, Node]]
    query_rows: Node
    row_weights: Node
    cached: list[Node]


def build(
    decoder: Decoder, weights: Weights, heads: dict[int, list[int]], rounds_states: bool
) -> Model:
    """Build the graph.

    Args:
        decoder: Shape of the model up to its highest selected head.
        weights: Weights of the checkpoint.
        heads: Selected heads by layer.
        rounds_states: Whether keys and values are rounded to eight bits before any token attends
            to them, so that new and cached ones are the same.

    Returns:
        A model whose inputs are those of `Inputs`, flattened. Its outputs are the attention mass
        of the selected heads in the order of ``heads``, float32, [B, heads, G, S]; then keys and
        values of the new tokens, in the order of the cached ones. Where they are rounded, they
        are int8, in and out, and their scales follow, float32, each [B, key heads, tokens, 1].
    """
    return _Builder(decoder, weights, rounds_states).model(heads)


class _Builder:
    def __init__(self, decoder: Decoder, weights: Weights, rounds_states: bool) -> None:
        self._decoder = decoder
        self._weights = weights
        self._rounds_states = rounds_states
        self._parameters: list[Node] = []
        self._states: list[Node] = []
        self._scales: list[Node] = []

    def model(self, heads: dict[int, list[int]]) -> Model:
        decoder = self._decoder
        inputs = self._inputs()
        hidden = ops.gather(self._weights.table("embed_tokens.weight"), inputs.tokens, _int(0))
        hidden = _scaled(ops.convert(hidden, "f32"), decoder.embedding_scale)
        # Grouped heads are concatenated along the token axis, so that keys are not repeated.
        groups = decoder.heads // decoder.key_heads
        tiled = {
            window: ops.unsqueeze(ops.concat([mask] * groups, 1), _int(1))
            for window, mask in inputs.mask.items()
        }
        row_masks = {
            window: ops.unsqueeze(ops.gather(mask, inputs.query_rows, _int(1), 1), _int(1))
            for window, mask in inputs.mask.items()
        }
        row_weights = ops.unsqueeze(ops.unsqueeze(inputs.row_weights, _int(1)), _int(-1))
        masses: list[Node] = []
        for layer in range(decoder.layers):
            is_last = layer == decoder.layers - 1
            window = decoder.windows[layer]
            rotary = inputs.rotary[decoder.rotaries[layer]]
            name = f"layers.{layer}.self_attn"
            normed = self._norm(hidden, f"layers.{layer}.input_layernorm.weight")
            query = self._heads(normed, f"{name}.q_proj", decoder.heads, f"{name}.q_norm", rotary)
            key = self._heads(normed, f"{name}.k_proj", decoder.key_heads, f"{name}.k_norm", rotary)
            keys = ops.concat([inputs.cached[2 * layer], self._returned(key)], 2)
            if layer in heads:
                masses.append(
                    self._mass(
                        query, keys, heads[layer], inputs.query_rows, row_masks[window], row_weights
                    )
                )
            if is_last:
                break
            value = self._heads(normed, f"{name}.v_proj", decoder.key_heads)
            values = ops.concat([inputs.cached[2 * layer + 1], self._returned(value)], 2)
            hidden = self._block(
                hidden,
                self._attention(query, keys, values, tiled[window], f"{name}.o_proj"),
                f"layers.{layer}.post_attention_layernorm.weight",
            )
            norm = "pre_feedforward" if decoder.has_outer_norms else "post_attention"
            normed = self._norm(hidden, f"layers.{layer}.{norm}_layernorm.weight")
            hidden = self._block(
                hidden,
                self._feed_forward(normed, f"layers.{layer}.mlp"),
                f"layers.{layer}.post_feedforward_layernorm.weight",
            )
        outputs = {
            "mass": ops.concat(masses, 1),
            **{f"state.{index}": state for index, state in enumerate(self._states)},
            **{f"scale.{index}": scale for index, scale in enumerate(self._scales)},
        }
        model = Model(list(outputs.values()), self._parameters, "core_rerank")
        for name, output in zip(outputs, model.outputs, strict=True):
            output.get_tensor().set_names({name})
        return model

    def _inputs(self) -> Inputs:
        decoder = self._decoder

        def parameter(name: str, shape: list[int], kind: Type = Type.f32) -> Node:
            node = ops.parameter(PartialShape(shape), kind, name=name)
            node.output(0).get_tensor().set_names({name})
            self._parameters.append(node)
            return node

        def cached() -> list[Node]:
            shape, count = [-1, decoder.key_heads, -1], 2 * decoder.layers - 1
            kind = Type.i8 if self._rounds_states else Type.f32
            states = [parameter(f"cached.{i}", [*shape, size], kind) for i in range(count)]
            if not self._rounds_states:
                return states
            scales = [parameter(f"cached_scale.{i}", [*shape, 1]) for i in range(count)]
            return [
                ops.multiply(ops.convert(state, "f32"), scale)
                for state, scale in zip(states, scales, strict=True)
            ]

        size = decoder.head_size
        return Inputs(
            parameter("tokens", [-1, -1], Type.i64),
            {
                window: parameter(f"mask.{window}", [-1, -1, -1])
                for window in dict.fromkeys(decoder.windows)
            },
            {
                rotary: (
                    parameter(f"cosines.{i}", [-1, -1, size]),
                    parameter(f"sines.{i}", [-1, -1, size]),
                )
                for i, rotary in enumerate(dict.fromkeys(decoder.rotaries))
            },
            parameter("query_rows", [-1, -1], Type.i64),
            parameter("row_weights", [-1, -1, -1]),
            cached(),
        )

    def _returned(self, numbers: Node) -> Node:
        """Add keys or values to the outputs; return what is attended to."""
        if not self._rounds_states:
            self._states.append(numbers)
            return numbers
        largest = ops.reduce_max(ops.abs(numbers), _int(-1), True)
        scale = ops.maximum(ops.multiply(largest, _float(1 / MAX_CODE)), _float(MIN_SCALE))
        # OpenVINO may multiply in bfloat16. With a scale of that precision, the products of new and
        # cached codes are the same.
        scale = ops.convert(ops.convert(scale, "bf16"), "f32")
        codes = ops.round(ops.divide(numbers, scale), "half_to_even")
        self._states.append(ops.convert(codes, "i8"))
        self._scales.append(scale)
        return ops.multiply(codes, scale)

    def _norm(self, hidden: Node, name: str) -> Node:
        weight = self._weights.vector(name) + np.float32(self._decoder.norm_offset)
        squares = ops.reduce_mean(ops.power(hidden, _float(2.0)), _int(-1), True)
        root = ops.sqrt(ops.add(squares, _float(self._decoder.norm_eps)))
        return ops.multiply(
            ops.multiply(hidden, ops.divide(_float(1.0), root)), ops.constant(weight)
        )

    def _linear(self, hidden: Node, name: str) -> Node:
        product = ops.matmul(hidden, self._weights.matrix(f"{name}.weight"), False, True)
        if f"{name}.bias" in self._weights:
            product = ops.add(product, ops.constant(self._weights.vector(f"{name}.bias")))
        return product

    def _heads(
        self,
        hidden: Node,
        name: str,
        count: int,
        norm: str | None = None,
        rotary: tuple[Node, Node] | None = None,
    ) -> Node:
        """Project to queries, keys or values, [B, heads, T, head size], and rotate them."""
        size = self._decoder.head_size
        split = ops.reshape(self._linear(hidden, name), _int([0, 0, count, size]), True)
        if norm is not None and f"{norm}.weight" in self._weights:
            split = self._norm(split, f"{norm}.weight")
        split = ops.transpose(split, _int([0, 2, 1, 3]))
        if rotary is None:
            return split
        cos, sin = (ops.unsqueeze(part, _int(1)) for part in rotary)
        first = ops.slice(split, _int([0]), _int([size // 2]), _int([1]), _int([3]))
        second = ops.slice(split, _int([size // 2]), _int([size]), _int([1]), _int([3]))
        rotated = ops.concat([ops.multiply(second, _float(-1.0)), first], 3)
        return ops.add(ops.multiply(split, cos), ops.multiply(rotated, sin))

    def _attention(self, query: Node, keys: Node, values: Node, mask: Node, name: str) -> Node:
        decoder = self._decoder
        grouped = ops.reshape(query, _int([0, decoder.key_heads, -1, decoder.head_size]), True)
        attended = ops.scaled_dot_product_attention(
            grouped, keys, values, mask, _float(decoder.attention_scale), False
        )
        by_head = ops.reshape(attended, ops.shape_of(query), False)
        joined = ops.reshape(
            ops.transpose(by_head, _int([0, 2, 1, 3])),
            _int([0, 0, decoder.heads * decoder.head_size]),
            True,
        )
        return self._linear(joined, name)

    def _mass(
        self,
        query: Node,
        keys: Node,
        heads: Sequence[int],
        query_rows: Node,
        mask: Node,
        row_weights: Node,
    ) -> Node:
        """Compute the attention mass of the selected heads of a layer, [B, heads, G, S]."""
        decoder = self._decoder
        groups = decoder.heads // decoder.key_heads
        selected = ops.gather(query, _int(list(heads)), _int(1))
        by_token = ops.transpose(selected, _int([0, 2, 1, 3]))
        rows = ops.transpose(ops.gather(by_token, query_rows, _int(1), 1), _int([0, 2, 1, 3]))
        head_keys = ops.gather(keys, _int([head // groups for head in heads]), _int(1))
        logits = _scaled(ops.matmul(rows, head_keys, False, True), decoder.attention_scale)
        attention = ops.softmax(ops.add(logits, mask), -1)
        return ops.reduce_sum(
            ops.multiply(ops.unsqueeze(attention, _int(2)), row_weights), _int(3), False
        )

    def _feed_forward(self, hidden: Node, name: str) -> Node:
        gate = self._linear(hidden, f"{name}.gate_proj")
        activate: Callable[[Node], Node] = (
            ops.swish if self._decoder.activation == "silu" else _gelu_tanh
        )
        return self._linear(
            ops.multiply(activate(gate), self._linear(hidden, f"{name}.up_proj")),
            f"{name}.down_proj",
        )

    def _block(self, hidden: Node, added: Node, outer_norm: str) -> Node:
        if self._decoder.has_outer_norms:
            added = self._norm(added, outer_norm)
        return ops.add(hidden, _scaled(added, self._decoder.residual_scale))


def _scaled(node: Node, factor: float) -> Node:
    return node if factor == 1.0 else ops.multiply(node, _float(factor))


def _gelu_tanh(node: Node) -> Node:
    return ops.gelu(node, "TANH")


def _int(value: int | list[int]) -> Node:
    return ops.constant(np.array(value, dtype=np.int64))


def _float(value: float) -> Node:
    return ops.constant(np.float32(value))
