"""The OpenVINO backend: CPUs, without PyTorch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from core_rerank_integrations.backends.local.backend import LocalBackend, PrefixRun
from core_rerank_integrations.backends.local.prefix_cache import (
    CachedPrefix,
    PrefixCache,
    TensorFormat,
)
from core_rerank_integrations.backends.openvino.decoder import Decoder
from core_rerank_integrations.errors import InvalidInputError, requires_extra
from core_rerank_integrations.heads.head_set import HeadSet
from core_rerank_integrations.method.prompt import TokenIds
from core_rerank_integrations.method.scoring import Mass
from core_rerank_integrations.models.local_model import LocalModel
from core_rerank_integrations.settings import DocumentCache

with requires_extra("cpu"):
    import safetensors.numpy

    from core_rerank_integrations.backends.openvino.batch import (
        Answer,
        Batch,
        Row,
        States,
        Workspace,
    )
    from core_rerank_integrations.backends.openvino.graph import build
    from core_rerank_integrations.backends.openvino.runtime import openvino
    from core_rerank_integrations.backends.openvino.weights import Weights

DTYPES = ("float32", "bfloat16", "int8")
MAX_NEW_TOKENS = 1024
"""Maximum number of new tokens in a pass, with padding. OpenVINO keeps memory for the largest pass,
some 0.25 MB a new token, and longer ones were not faster on one thread."""
MAX_LOGITS = 1 << 20
"""Maximum number of new tokens in a pass times the tokens that each may see."""
MAX_TOKENS = 4096
"""Maximum number of cached and new tokens in a pass, with padding. Cached ones are copied."""
MAX_PIECE_TOKENS = 1024
"""Longer prefixes and questions are read in pieces of at most this length."""
MAX_PREPARED_SHAPES = 64
"""Number of input shapes for which OpenVINO keeps what it has prepared, some 5 MB each. By default
it keeps 5,000. Shapes seldom repeat, so the limit costs little: see benchmarks/README.md."""
CACHE_FORMAT = 3
"""Increased when the meaning of cached prefixes changes."""


class OpenVINOBackend(LocalBackend):
    """Compute attention mass with a decoder that OpenVINO runs on the CPU.

    Args:
        model: Folder of the model, with safetensors files.
        head_set: The heads to read.
        dtype: ``float32``; ``bfloat16``, if the processor supports it; ``int8``, which rounds
            weights and activations to eight bits where they are multiplied; or ``auto``, which is
            bfloat16 if the processor supports it, else float32. Attention mass is always float32.
        document_cache: Size and folder of the cache; ``None`` for the defaults.

    Keys and values are rounded to eight bits, with a scale per token and key head, before any
    token attends to them. They are cached as such, so a score does not depend on whether a
    document was cached. With ``dtype="float32"`` they stay exact.

    The environment variable ``OMP_NUM_THREADS`` limits the number of threads.

    Raises:
        UnsupportedModelError: The model's type is not supported.
        InvalidInputError: The dtype is unknown, or the processor does not support it.
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
        by_layer = head_set.by_layer
        # The graph reports heads layer by layer.
        graph_order = [index for heads in by_layer.values() for _, index in heads]
        self._head_order = np.argsort(graph_order)
        self._rounds_states = dtype != "float32"
        heads = [(head.layer, head.head) for head in head_set.heads]
        identity = repr(
            ("openvino", CACHE_FORMAT, model.fingerprint(), self.dtype, self._rounds_states, heads)
        )
        file_format = TensorFormat(_to_file, safetensors.numpy.load)
        super().__init__(PrefixCache(document_cache or DocumentCache(), identity, file_format))
        self._decoder = Decoder.from_config(config, head_set.highest_layer + 1)
        self._weights = Weights(model.path, eight_bit=self.dtype == "int8")
        selected = {layer: [head for head, _ in heads] for layer, heads in by_layer.items()}
        graph = build(self._decoder, self._weights, selected, self._rounds_states)
        properties: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if has_bfloat16 and dtype != "float32" else "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 32 if self.dtype == "int8" else 0,
            "CPU_RUNTIME_CACHE_CAPACITY": MAX_PREPARED_SHAPES,
            # OpenVINO would pin its threads to the first cores, to the same ones in every process.
            "ENABLE_CPU_PINNING": False,
        }
        threads = os.environ.get("OMP_NUM_THREADS", "")
        if threads.isdecimal():  # PyTorch keeps to it by itself, OpenVINO does not.
            properties["INFERENCE_NUM_THREADS"] = int(threads)
        self._workspace = Workspace()
        self._request = core.compile_model(graph, "CPU", properties).create_infer_request()

    def _free(self) -> None:
        del self._request, self._workspace, self._weights

    def _fits(self, runs: Sequence[PrefixRun]) -> bool:
        if len({run.cached is None for run in runs}) > 1:
            return False
        if any(_needs_pieces(run) for run in runs):
            return False
        new = len(runs) * max(run.tokens for run in runs)
        seen = max(len(run.prefix.ids) + sum(map(len, run.questions)) for run in runs)
        return new <= MAX_NEW_TOKENS and new * seen <= MAX_LOGITS and len(runs) * seen <= MAX_TOKENS

    def _forward(self, runs: Sequence[PrefixRun], keep: bool) -> list[list[Mass]]:
        if len(runs) == 1 and _needs_pieces(runs[0]):
            return [self._read_in_pieces(runs[0])]
        rows = [
            Row(self._empty_states(), run.prefix.ids, run.prefix.instruction_length, run.questions)
            if run.cached is None
            else Row(run.cached.states, run.prefix.ids[:0], 0, run.questions)
            for run in runs
        ]
        masses = []
        for run, answer in zip(runs, self._run_rows(rows), strict=True):
            cached = run.cached or CachedPrefix(answer.instruction_mass, answer.states)
            if keep:
                run.cached = cached
            masses.append([_mean(run, cached, mass) for mass in answer.question_masses])
        return masses

    def _read_in_pieces(self, run: PrefixRun) -> list[Mass]:
        """Read a run alone, each piece with the keys and values of the pieces before it."""
        if run.cached is None:
            mass, states = self._read_after(
                self._empty_states(), run.prefix.ids, run.prefix.instruction_length
            )
            run.cached = CachedPrefix(mass, states)
        return [
            _mean(run, run.cached, self._read_after(run.cached.states, ids, len(ids))[0])
            for ids in run.questions
        ]

    def _read_after(self, states: States, ids: TokenIds, query_rows: int) -> tuple[Mass, States]:
        """Read tokens after cached ones, in pieces that keep the memory of a pass bounded.

        Args:
            states: Keys and values of the cached tokens.
            ids: The tokens.
            query_rows: Number of tokens at the end of ``ids`` whose attention is summed.

        Returns:
            The sum, [heads, all tokens], and keys and values of all tokens.
        """
        before = states[0].shape[2]
        total = before + len(ids)
        mass = np.zeros((len(self._head_order), total), dtype=np.float32)
        start = before
        while start < total:
            length = min(MAX_PIECE_TOKENS, max(MAX_LOGITS // (start + MAX_PIECE_TOKENS), 1))
            stop = min(start + length, total)
            rows = min(max(stop - (total - query_rows), 0), stop - start)
            piece = ids[start - before : stop - before]
            (answer,) = self._run_rows([Row(states, piece, rows, ())])
            mass[:, :stop] += answer.instruction_mass
            states = [
                np.concatenate(parts, axis=2) for parts in zip(states, answer.states, strict=True)
            ]
            start = stop
        return mass, states

    def _run_rows(self, rows: Sequence[Row]) -> list[Answer]:
        batch = Batch(self._decoder, rows)
        self._request.infer(batch.inputs(self._workspace), share_inputs=True)
        outputs = [tensor.data for tensor in self._request.output_tensors]
        outputs[0] = outputs[0][:, self._head_order]
        return batch.answers(outputs)

    def _empty_states(self) -> States:
        decoder = self._decoder
        shape = (2 * decoder.layers - 1, decoder.key_heads, 0)
        if not self._rounds_states:
            return [np.zeros((*shape, decoder.head_size), dtype=np.float32)]
        return [
            np.zeros((*shape, decoder.head_size), dtype=np.int8),
            np.zeros((*shape, 1), dtype=np.float32),
        ]


def _needs_pieces(run: PrefixRun) -> bool:
    is_long = run.cached is None and len(run.prefix.ids) > MAX_PIECE_TOKENS
    return is_long or any(len(question) > MAX_PIECE_TOKENS for question in run.questions)


def _mean(run: PrefixRun, cached: CachedPrefix, mass: Mass) -> Mass:
    """Add the instruction's rows to those of a question, [heads, tokens]; return their mean."""
    border = len(run.prefix.ids)
    mass[:, :border] += cached.instruction_mass
    mass /= run.prefix.instruction_length + mass.shape[1] - border
    return mass


def _to_file(tensors: dict[str, npt.NDArray[Any]]) -> bytes:
    # safetensors writes arrays as if they were contiguous.
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    content: bytes = safetensors.numpy.save(contiguous)
    return content


def _dtype(name: str, has_bfloat16: bool) -> str:
    if name == "auto":
        return "bfloat16" if has_bfloat16 else "float32"
    if name not in DTYPES:
        raise InvalidInputError(
            f"dtype must be 'auto' or, with OpenVINO, one of {', '.join(DTYPES)}, got {name!r}"
        )
    if name == "bfloat16" and not has_bfloat16:
        raise InvalidInputError("this processor does not support bfloat16; leave dtype at 'auto'")
    return name
