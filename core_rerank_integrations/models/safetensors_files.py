"""Safetensors files, read and written by NumPy, which has no bfloat16."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from core_rerank_integrations.errors import ModelError

STORED_AS: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
"""NumPy's type for the numbers of a tensor, by their type in the file."""
PREFIXES = ("model.", "model.language_model.", "language_model.model.", "")
"""Prefixes of the names of a decoder's weights in different checkpoints."""


class StoredTensor(NamedTuple):
    """A tensor of a safetensors file.

    Attributes:
        path: The file.
        dtype: Type of its numbers in the words of the format, such as ``BF16``.
        shape: Its shape.
        start: Where it begins in the file.
        size: Number of its bytes.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def mapped(self) -> npt.NDArray[Any]:
        """Return the numbers as they are stored, without reading them; see `STORED_AS`."""
        stored_as = STORED_AS[self.dtype]
        return np.memmap(self.path, stored_as, mode="r", offset=self.start, shape=self.shape)


class NewTensor(NamedTuple):
    """A tensor to write.

    Attributes:
        name: Its name.
        dtype: Type of its numbers; see `STORED_AS`.
        shape: Its shape.
        numbers: Computes the numbers as they are stored.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    numbers: Callable[[], npt.NDArray[Any]]


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return the tensors of safetensors files by name.

    Raises:
        ModelError: A file cannot be read or is damaged.
    """
    found = {}
    for path in files:
        header, start = safetensors_header(path)
        try:
            for name, entry in header.items():
                found[name] = _stored(path, start, **entry)
        except (TypeError, ValueError) as error:
            raise ModelError(f"{path} is damaged: {error}. Delete it and fetch it again") from error
    return found


def decoder_prefix(tensors: Iterable[str], folder: Path) -> str:
    """Return what the names of a decoder's weights begin with in a checkpoint.

    Raises:
        ModelError: No tensor is a decoder's table of embeddings.
    """
    names = set(tensors)
    for prefix in PREFIXES:
        if f"{prefix}embed_tokens.weight" in names:
            return prefix
    raise ModelError(f"{folder} holds no safetensors files with a decoder's weights")


def safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """Read the header of a safetensors file.

    Returns:
        Type, shape and offsets of each tensor by its name, and where the first tensor begins.

    Raises:
        ModelError: The file cannot be read or is damaged.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            header = json.loads(file.read(min(length, size)))
        header.pop("__metadata__", None)
        start = 8 + length
        expected = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except OSError as error:
        raise ModelError(f"cannot read the weights in {path}: {error}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is damaged: delete it and fetch it again") from error
    if size != expected:
        raise ModelError(
            f"{path} is damaged: it has {size} bytes instead of {expected}. Delete it and fetch "
            "it again"
        )
    return header, start


def write_safetensors(path: Path, tensors: Sequence[NewTensor]) -> None:
    """Write a safetensors file, one tensor after the other to save memory.

    Raises:
        ValueError: The numbers of a tensor have another shape than was said.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        stop = start + prod(tensor.shape) * STORED_AS[tensor.dtype].itemsize
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        for tensor in tensors:
            numbers = tensor.numbers()
            if numbers.shape != tensor.shape:
                raise ValueError(f"{tensor.name} has shape {numbers.shape}, not {tensor.shape}")
            file.write(np.ascontiguousarray(numbers, STORED_AS[tensor.dtype]).data)


def to_float32(stored: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Return numbers of a stored type as float32."""
    if dtype == "BF16":  # The upper half of a float32.
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def from_float32(full: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """Round numbers to a stored type: to the nearest, and ties to the even one, as PyTorch does."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(full, dtype=np.float32).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return full.astype(STORED_AS[dtype])


def _stored(
    path: Path, start: int, dtype: str, shape: list[int], data_offsets: list[int]
) -> StoredTensor:
    begin, end = data_offsets
    stored_as = STORED_AS.get(dtype)
    if stored_as and end - begin != prod(shape) * stored_as.itemsize:
        raise ValueError(f"{end - begin} bytes are no {shape} numbers of type {dtype}")
    return StoredTensor(path, dtype, tuple(shape), start + begin, end - begin)
