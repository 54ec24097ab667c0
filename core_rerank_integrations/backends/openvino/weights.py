"""The weights of a checkpoint as constants of a graph, read without PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
from core_rerank_integrations.models.safetensors_files import (
    StoredTensor,
    decoder_prefix,
    stored_tensors,
    to_float32,
)

TYPES = {"F32": Type.f32, "F16": Type.f16, "BF16": Type.bf16}
"""OpenVINO's type for the numbers of a tensor, by their type in the file."""
DECOMPRESSION = "decompression_0"
"""Marks a conversion of weights that OpenVINO leaves for the products. Others it does at once, and
keeps the result."""


class Weights:
    """Weights of a decoder by their names inside the model.

    Args:
        folder: Folder of the checkpoint's safetensors files. They are mapped into memory, not
            copied: this object must exist as long as the compiled model.
        eight_bit: Whether to round matrices to eight bits, with a scale per row.

    Raises:
        ModelError: The folder has no safetensors files of a decoder.
    """

    def __init__(self, folder: Path, eight_bit: bool = False) -> None:
        self._eight_bit = eight_bit
        self._folder = folder
        tensors = stored_tensors(sorted(folder.glob("*.safetensors")))
        self._stored = {name: item for name, item in tensors.items() if item.dtype in TYPES}
        self._prefix = decoder_prefix(self._stored, folder)
        self._mapped: list[npt.NDArray[Any]] = []

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
            converted = ops.convert(self._constant(stored), "f32")
            converted.get_rt_info()[DECOMPRESSION] = ""
            return converted
        full = self._numbers(stored)
        scale = np.abs(full).max(axis=1, keepdims=True) / 127
        scale[scale == 0] = 1
        rounded = ops.constant(np.round(full / scale).astype(np.int8))
        return ops.multiply(ops.convert(rounded, "f32"), ops.constant(scale))

    def _find(self, name: str) -> StoredTensor:
        try:
            return self._stored[self._prefix + name]
        except KeyError:
            raise ModelError(
                f"{self._folder} lacks the weights {self._prefix + name}, so its scores would be "
                "random"
            ) from None

    def _constant(self, stored: StoredTensor) -> Node:
        numbers = stored.mapped()
        self._mapped.append(numbers)
        return Constant(Tensor(numbers, Shape(list(stored.shape)), TYPES[stored.dtype]), True)

    def _numbers(self, stored: StoredTensor) -> npt.NDArray[np.float32]:
        return to_float32(stored.mapped(), stored.dtype)
