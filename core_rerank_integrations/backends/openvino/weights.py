"""The weights of a checkpoint as constants of a graph, read without PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from core_rerank_integrations.backends.openvino.runtime import (
    Constant,
    Node,
    Shape,
    Tensor,
    Type,
    ops,
)
from core_rerank_integrations.errors import ModelError
from core_rerank_integrations.models.local_model import safetensors_header

PREFIXES = ("model.", "model.language_model.", "language_model.model.", "")
"""Prefixes of the names of a decoder's weights in different checkpoints."""


class _Kind(NamedTuple):
    stored: npt.DTypeLike
    type: Type


KINDS = {
    "F32": _Kind(np.float32, Type.f32),
    "F16": _Kind(np.float16, Type.f16),
    "BF16": _Kind(np.uint16, Type.bf16),  # NumPy has no bfloat16.
}


class _Stored(NamedTuple):
    path: Path
    kind: _Kind
    shape: list[int]
    offset: int


class Weights:
    """Weights of a decoder by their names inside the model.

    Args:
        folder: Folder of the checkpoint's safetensors files, which must exist until the graph is
            compiled.
        eight_bit: Whether to round matrices to eight bits, with a scale per row.

    Raises:
        ModelError: The folder has no safetensors files of a decoder.
    """

    def __init__(self, folder: Path, eight_bit: bool = False) -> None:
        self._eight_bit = eight_bit
        self._folder = folder
        self._stored = {
            name: stored
            for path in sorted(folder.glob("*.safetensors"))
            for name, stored in _index(path)
        }
        prefixes = [prefix for prefix in PREFIXES if f"{prefix}embed_tokens.weight" in self._stored]
        if not prefixes:
            raise ModelError(f"{folder} holds no safetensors files with a decoder's weights")
        self._prefix = prefixes[0]

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._stored

    def vector(self, name: str) -> npt.NDArray[np.float32]:
        """Return the weights of a norm, or a bias."""
        return self._numbers(self._find(name))

    def table(self, name: str) -> Node:
        """Return an embedding table in its stored precision."""
        return self._constant(self._find(name))

    def matrix(self, name: str) -> Node:
        """Return a matrix to multiply with, [out, in], as float32."""
        stored = self._find(name)
        if not self._eight_bit:
            return ops.convert(self._constant(stored), "f32")
        full = self._numbers(stored)
        scale = np.abs(full).max(axis=1, keepdims=True) / 127
        scale[scale == 0] = 1
        rounded = ops.constant(np.round(full / scale).astype(np.int8))
        return ops.multiply(ops.convert(rounded, "f32"), ops.constant(scale))

    def _find(self, name: str) -> _Stored:
        try:
            return self._stored[self._prefix + name]
        except KeyError:
            raise ModelError(
                f"{self._folder} lacks the weights {self._prefix + name}, so its scores would be "
                "random"
            ) from None

    def _constant(self, stored: _Stored) -> Node:
        return Constant(Tensor(_mapped(stored), Shape(stored.shape), stored.kind.type), False)

    def _numbers(self, stored: _Stored) -> npt.NDArray[np.float32]:
        mapped = _mapped(stored)
        if stored.kind.type == Type.bf16:  # The upper half of a float32.
            return (mapped.astype(np.uint32) << 16).view(np.float32)
        return mapped.astype(np.float32)


def _mapped(stored: _Stored) -> npt.NDArray[np.generic]:
    shape = tuple(stored.shape)
    return np.memmap(stored.path, stored.kind.stored, mode="r", offset=stored.offset, shape=shape)


def _index(path: Path) -> Iterator[tuple[str, _Stored]]:
    header, start = safetensors_header(path)
    for name, entry in header.items():
        if kind := KINDS.get(entry["dtype"]):
            yield name, _Stored(path, kind, entry["shape"], start + entry["data_offsets"][0])
