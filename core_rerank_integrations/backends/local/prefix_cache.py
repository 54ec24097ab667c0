"""Cached prefixes: what later questions need of documents that were read."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from cachetools import LRUCache

from core_rerank_integrations.backends.local.store import DocumentStore
from core_rerank_integrations.method.scoring import Mass
from core_rerank_integrations.models.local_model import cache_folder
from core_rerank_integrations.settings import DocumentCache


class TensorFormat(NamedTuple):
    """How a library writes its tensors as safetensors bytes, and reads them."""

    save: Callable[[dict[str, Any]], bytes]
    load: Callable[[bytes], dict[str, Any]]


@dataclass
class CachedPrefix:
    """What a later question needs of a prefix.

    Attributes:
        instruction_mass: Attention of the instruction's rows of the query span, summed over
            these rows, shape [heads, prefix tokens].
        states: Keys and values in the backend's own form, with rotary embedding applied.
        baseline_mass: Attention mass of the baseline question, shape [heads, context length + 1];
            ``None`` if it was not computed.
    """

    instruction_mass: Any
    states: list[Any] = field(default_factory=list)
    baseline_mass: Mass | None = None

    def nbytes(self) -> int:
        """Return the size in bytes."""
        tensors = [self.instruction_mass, *self.states]
        if self.baseline_mass is not None:
            tensors.append(self.baseline_mass)
        return sum(tensor.nbytes for tensor in tensors)

    def to_bytes(self, file_format: TensorFormat) -> bytes:
        """Return the content of a file."""
        tensors = {f"state.{index}": state for index, state in enumerate(self.states)}
        tensors["instruction_mass"] = self.instruction_mass
        if self.baseline_mass is not None:
            tensors["baseline_mass"] = self.baseline_mass
        return file_format.save(tensors)

    @classmethod
    def from_bytes(cls, content: bytes, file_format: TensorFormat) -> CachedPrefix:
        """Read the content of a file; the reverse of `to_bytes`."""
        tensors = file_format.load(content)
        instruction_mass = tensors.pop("instruction_mass")
        baseline_mass = tensors.pop("baseline_mass", None)
        states = [tensors[f"state.{index}"] for index in range(len(tensors))]
        return cls(
            instruction_mass, states, None if baseline_mass is None else np.asarray(baseline_mass)
        )


class PrefixCache:
    """Cached prefixes by their keys, in memory and on disk. Thread-safe.

    Args:
        config: Sizes and folder.
        identity: What a cached prefix depends on besides its tokens: model, heads, dtype.
        file_format: Format of the files.
    """

    def __init__(self, config: DocumentCache, identity: str, file_format: TensorFormat) -> None:
        self.identity = identity
        self.memory_bytes = config.memory_bytes
        self.writes = config.disk_bytes > 0
        self._file_format = file_format
        self._lock = threading.Lock()
        self._memory: LRUCache[bytes, CachedPrefix] = LRUCache(
            config.memory_bytes, getsizeof=CachedPrefix.nbytes
        )
        folder = config.folder or cache_folder("documents")
        self._store = DocumentStore(folder, config.disk_bytes, identity)

    def __len__(self) -> int:
        """Return the number of prefixes in memory."""
        return len(self._memory)

    @property
    def nbytes(self) -> int:
        """Size of the prefixes in memory, in bytes."""
        return int(self._memory.currsize)

    def get(self, key: bytes) -> CachedPrefix | None:
        """Return a prefix from memory or disk."""
        with self._lock:
            cached = self._memory.get(key)
        if cached is None and (content := self._store.get(key)) is not None:
            cached = CachedPrefix.from_bytes(content, self._file_format)
            self.put(key, cached)
        return cached

    def in_memory(self, key: bytes) -> bool:
        """Return whether a prefix is in memory."""
        with self._lock:
            return key in self._memory

    def put(self, key: bytes, cached: CachedPrefix) -> None:
        """Add a prefix to memory, unless it is larger than the whole cache."""
        if cached.nbytes() <= self._memory.maxsize:
            with self._lock:
                self._memory[key] = cached

    def __contains__(self, key: bytes) -> bool:
        return self.in_memory(key) or key in self._store

    def touch_file(self, key: bytes) -> bool:
        """Return whether a prefix is on disk, and mark it as used now."""
        return self._store.touch(key)

    def write(self, key: bytes, cached: CachedPrefix) -> int:
        """Write a prefix to disk; return the size of its file in bytes.

        Raises:
            StorageError: The file cannot be written.
        """
        content = cached.to_bytes(self._file_format)
        self._store.put(key, content)
        return len(content)

    def trim(self) -> int:
        """Drop the least recently used files; see `DocumentStore.trim`."""
        return self._store.trim()

    def clear(self) -> None:
        """Drop all prefixes from memory."""
        with self._lock:
            self._memory.clear()
