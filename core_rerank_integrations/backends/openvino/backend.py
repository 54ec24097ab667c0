"""The OpenVINO backend: CPUs, without PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from core_rerank_integrations.backends.known_documents import (
    KnownDocuments,
    KnownOpening,
    TensorFile,
)
from core_rerank_integrations.backends.local import LocalBackend
from core_rerank_integrations.backends.openvino.decoder import Decoder
from core_rerank_integrations.backends.prompt_groups import PromptGroup
from core_rerank_integrations.errors import InvalidInputError, requires_extra
from core_rerank_integrations.heads import HeadSet
from core_rerank_integrations.models import LocalModel
from core_rerank_integrations.scoring import Mass
from core_rerank_integrations.store import DocumentCache

with requires_extra("cpu"):
    import openvino
    import safetensors.numpy

    from core_rerank_integrations.backends.openvino.batch import Answer, Batch, Row, Workspace
    from core_rerank_integrations.backends.openvino.graph import build
    from core_rerank_integrations.backends.openvino.weights import Weights

DTYPES = ("float32", "bfloat16", "int8")
BATCH_TOKENS = 2048
"""New tokens of one pass, padding included."""
BATCH_LOGITS = 1 << 22
"""New tokens of one pass times the tokens that each may see."""
BATCH_SEEN = 10240
"""Known and new tokens of one pass, padding included; known ones are copied for it."""
LONGEST_OPENING = 1024
"""A longer one is read piece by piece."""
KEPT_FORMAT = 1
"""Counts up when what is kept of documents changes its meaning."""


class OpenVINOBackend(LocalBackend):
    """CoRe attention mass from a decoder that OpenVINO runs on the CPU.

    Args:
        model: The model's folder, with safetensors files.
        head_set: The heads to read.
        dtype: ``float32``; ``bfloat16``, if the processor has it; ``int8``: weights and
            activations rounded to eight bits where they are multiplied; or ``auto``: bfloat16
            where the processor has it, else float32. Attention mass is float32 always.
        document_cache: How much is kept of the keys and values of documents that were read, and
            where; ``None`` for the defaults of `DocumentCache`. They are kept in float16 unless
            the dtype is float32.

    Raises:
        UnsupportedModelError: The model is of no type that this backend knows.
        InvalidInputError: There is no such dtype, or not on this processor.
        ModelError: Weights are missing.
    """

    def __init__(
        self,
        model: LocalModel,
        head_set: HeadSet,
        *,
        dtype: str = "auto",
        document_cache: DocumentCache | None = None,
    ) -> None:
        core = openvino.Core()
        has_bfloat16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self.dtype = _dtype(dtype, has_bfloat16)
        config = model.config()
        self.max_context: int = config.max_position_embeddings
        by_layer: dict[int, list[int]] = {}
        for head in sorted(head_set.heads, key=lambda head: head.layer):
            by_layer.setdefault(head.layer, []).append(head.head)
        read = [(layer, head) for layer, heads in by_layer.items() for head in heads]
        heads = [(head.layer, head.head) for head in head_set.heads]
        self._places = [read.index(head) for head in heads]
        self._kept: type = np.float32 if self.dtype == "float32" else np.float16
        identity = repr(("openvino", KEPT_FORMAT, model.fingerprint(), self.dtype, heads))
        file = TensorFile(_to_file, safetensors.numpy.load)
        super().__init__(
            head_set, KnownDocuments(document_cache or DocumentCache(), identity, file)
        )
        self._decoder = Decoder.from_config(config, head_set.highest_layer + 1)
        weights = Weights(model.path, eight_bit=self.dtype == "int8")
        graph = build(self._decoder, weights, by_layer, openvino.Type(self._kept))
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if has_bfloat16 and dtype != "float32" else "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 32 if self.dtype == "int8" else 0,
        }
        self._workspace = Workspace()
        self._request = core.compile_model(graph, "CPU", settings).create_infer_request()

    def _free(self) -> None:
        del self._request, self._workspace

    def _fits(self, groups: Sequence[PromptGroup]) -> bool:
        if len({group.known is None for group in groups}) > 1:
            return False
        if max(len(group.opening) for group in groups) > LONGEST_OPENING:
            return False
        new = len(groups) * max(group.tokens for group in groups)
        seen = max(len(group.opening) + sum(map(len, group.questions)) for group in groups)
        return (
            new <= BATCH_TOKENS and new * seen <= BATCH_LOGITS and len(groups) * seen <= BATCH_SEEN
        )

    def _forward(self, groups: Sequence[PromptGroup], keep: bool) -> list[list[Mass]]:
        for group in groups:
            if group.known is None and len(group.opening) > LONGEST_OPENING:
                group.known = self._read_in_pieces(group)
        rows = [
            Row(self._nothing(), group.opening, group.rows, group.questions)
            if group.known is None
            else Row(group.known.states[0], group.opening[:0], 0, group.questions)
            for group in groups
        ]
        masses = []
        for group, answer in zip(groups, self._run(rows), strict=True):
            if group.known is None:
                opening = KnownOpening(answer.opening_mass, [answer.states])
                if keep:
                    group.known = opening
            else:
                opening = group.known
            if keep:
                self._known.keep(group.key, opening)
            border = len(group.opening)
            for mass in answer.question_masses:
                mass[:, :border] += opening.mass
                mass /= group.rows + mass.shape[1] - border
            masses.append(answer.question_masses)
        return masses

    def _read_in_pieces(self, group: PromptGroup) -> KnownOpening:
        """Read a long opening, each piece with the keys and values of those before it."""
        states = self._nothing()
        count, length = len(self._places), len(group.opening)
        mass = np.zeros((count, length), dtype=np.float32)
        for begin in range(0, length, LONGEST_OPENING):
            piece = group.opening[begin : begin + LONGEST_OPENING]
            stop = begin + len(piece)
            rows = min(max(stop - (length - group.rows), 0), len(piece))
            (answer,) = self._run([Row(states, piece, rows, ())])
            mass[:, :stop] += answer.opening_mass
            states = np.concatenate((states, answer.states), axis=2)
        return KnownOpening(mass, [states])

    def _run(self, rows: Sequence[Row]) -> list[Answer]:
        batch = Batch(self._decoder, rows)
        self._request.infer(batch.inputs(self._workspace), share_inputs=True)
        outputs = [self._request.get_output_tensor(i).data for i in range(2 * self._decoder.layers)]
        outputs[0] = outputs[0][:, self._places]
        return batch.answers(outputs)

    def _nothing(self) -> npt.NDArray[Any]:
        decoder = self._decoder
        shape = (2 * decoder.layers - 1, decoder.key_heads, 0, decoder.head_size)
        return np.zeros(shape, dtype=self._kept)


def _to_file(tensors: dict[str, npt.NDArray[Any]]) -> bytes:
    # What is not contiguous would be written as if it were.
    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    content: bytes = safetensors.numpy.save(whole)
    return content


def _dtype(name: str, has_bfloat16: bool) -> str:
    if name == "auto":
        return "bfloat16" if has_bfloat16 else "float32"
    if name not in DTYPES:
        raise InvalidInputError(
            f"dtype must be 'auto' or, with OpenVINO, one of {', '.join(DTYPES)}, got {name!r}"
        )
    if name == "bfloat16" and not has_bfloat16:
        raise InvalidInputError(
            "this processor does not compute in bfloat16; leave dtype at 'auto'"
        )
    return name
