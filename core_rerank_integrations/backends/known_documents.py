"""What backends of this process keep of documents that they have read, in memory and on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from cachetools import LRUCache

from core_rerank_integrations.models import cache_folder
from core_rerank_integrations.scoring import Mass
from core_rerank_integrations.store import DocumentCache, DocumentStore


class TensorFile(NamedTuple):
    """How a library writes its tensors as a file of safetensors, and reads them back."""

    save: Callable[[dict[str, Any]], bytes]
    load: Callable[[bytes], dict[str, Any]]


@dataclass
class KnownOpening:
    """What a later question needs of all that comes before it.

    Attributes:
        mass: Attention of its rows of the query span, summed over these; [heads, opening tokens].
        states: Keys and values, in the backend's own form; rotary embedding applied.
        answers: Attention mass, [heads, all tokens], by the tokens of a question that was asked
            when it was remembered: ``N/A``.
    """

    mass: Any
    states: list[Any] = field(default_factory=list)
    answers: dict[bytes, Mass] = field(default_factory=dict)

    def size(self) -> int:
        """Bytes."""
        return sum(tensor.nbytes for tensor in (self.mass, *self.states, *self.answers.values()))

    def to_bytes(self, file: TensorFile) -> bytes:
        """As a file."""
        states = {f"state.{place}": state for place, state in enumerate(self.states)}
        answers = {f"answer.{asked.hex()}": mass for asked, mass in self.answers.items()}
        return file.save({"mass": self.mass, **states, **answers})

    @classmethod
    def from_bytes(cls, content: bytes, file: TensorFile) -> KnownOpening:
        """Reverse of `to_bytes`."""
        tensors = file.load(content)
        answers = {
            bytes.fromhex(name.removeprefix("answer.")): np.asarray(tensors[name])
            for name in tensors
            if name.startswith("answer.")
        }
        states = [tensors[f"state.{place}"] for place in range(len(tensors) - len(answers) - 1)]
        return cls(tensors["mass"], states, answers)


class KnownDocuments:
    """Openings by their tokens. Not for several threads at once.

    Args:
        cache: How much is kept, and where.
        identity: What an opening depends on besides its tokens: model, heads, dtype.
        file: How it is written.
    """

    def __init__(self, cache: DocumentCache, identity: str, file: TensorFile) -> None:
        self.memory_bytes = cache.memory_bytes
        self.writes = cache.disk_bytes > 0
        self._file = file
        self._memory: LRUCache[bytes, KnownOpening] = LRUCache(
            cache.memory_bytes, getsizeof=KnownOpening.size
        )
        folder = cache.folder or cache_folder("documents")
        self._store = DocumentStore(folder, cache.disk_bytes, identity)

    def __len__(self) -> int:
        """How many are in memory."""
        return len(self._memory)

    @property
    def size(self) -> int:
        """Bytes of those in memory."""
        return int(self._memory.currsize)

    def get(self, key: bytes) -> KnownOpening | None:
        """One that was kept."""
        known = self._memory.get(key)
        if known is None and (content := self._store.get(key)) is not None:
            known = KnownOpening.from_bytes(bytes(content), self._file)
            self.keep(key, known)
        return known

    def keep(self, key: bytes, known: KnownOpening) -> None:
        """In memory, if there is room for it at all."""
        if known.size() <= self._memory.maxsize:
            self._memory[key] = known

    def is_known(self, key: bytes) -> bool:
        """Whether it was kept, as far as a look at the disk tells."""
        return key in self._memory or key in self._store

    def is_written(self, key: bytes) -> bool:
        """Whether it is on disk; it then counts as used just now."""
        return self._store.touch(key)

    def write(self, key: bytes, known: KnownOpening, answers: Mapping[bytes, Mass]) -> int:
        """Write it to disk with the answers to some questions; the bytes that it takes there.

        Raises:
            StorageError: It cannot be written.
        """
        known.answers.update(answers)
        self.keep(key, known)  # It has grown.
        content = known.to_bytes(self._file)
        self._store.put(key, content)
        return len(content)

    def trim(self) -> int:
        """See `DocumentStore.trim`."""
        return self._store.trim()

    def clear(self) -> None:
        """Forget those in memory."""
        self._memory.clear()
