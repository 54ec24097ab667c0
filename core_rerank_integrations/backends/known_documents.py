"""What the Transformers backend keeps of documents that it has read, in memory and on disk."""

from __future__ import annotations

from dataclasses import dataclass, field

from cachetools import LRUCache

from core_rerank_integrations.errors import requires_extra
from core_rerank_integrations.models import cache_folder
from core_rerank_integrations.store import DocumentCache, DocumentStore

with requires_extra("transformers"):
    import safetensors.torch
    import torch
    from torch import Tensor


@dataclass
class KnownOpening:
    """What a later question needs of all that comes before it."""

    mass: Tensor
    """Attention of its rows of the query span, summed over these; [heads, opening tokens]."""
    keys: list[Tensor] = field(default_factory=list)
    """Per layer, [key heads, opening tokens, head size]; rotary embedding applied."""
    values: list[Tensor] = field(default_factory=list)
    """The same, but for the last layer, whose output nobody needs."""

    def size(self) -> int:
        """Bytes."""
        return sum(tensor.nbytes for tensor in (self.mass, *self.keys, *self.values))

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        tensors = {"mass": self.mass}
        tensors |= {f"keys.{layer}": keys for layer, keys in enumerate(self.keys)}
        tensors |= {f"values.{layer}": values for layer, values in enumerate(self.values)}
        content: bytes = safetensors.torch.save(
            {name: tensor.contiguous() for name, tensor in tensors.items()}
        )
        return content

    @classmethod
    def from_bytes(cls, content: bytes, device: torch.device) -> KnownOpening:
        """Reverse of `to_bytes`."""
        tensors = {
            name: tensor.to(device) for name, tensor in safetensors.torch.load(content).items()
        }
        mass = tensors.pop("mass")
        count = sum(name.startswith("keys.") for name in tensors)
        keys = [tensors.pop(f"keys.{layer}") for layer in range(count)]
        return cls(mass, keys, [tensors[f"values.{layer}"] for layer in range(len(tensors))])


class KnownDocuments:
    """Openings by their tokens. Not for several threads at once.

    Args:
        cache: How much is kept, and where.
        identity: What an opening depends on besides its tokens: model, heads, dtype.
        device: Where it is needed.
    """

    def __init__(self, cache: DocumentCache, identity: str, device: torch.device) -> None:
        self.memory_bytes = cache.memory_bytes
        self.writes = cache.disk_bytes > 0
        self._device = device
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
            known = KnownOpening.from_bytes(bytes(content), self._device)
            self.keep(key, known)
        return known

    def keep(self, key: bytes, known: KnownOpening) -> None:
        """In memory, if there is room for it at all."""
        if known.size() <= self._memory.maxsize:
            self._memory[key] = known

    def is_written(self, key: bytes) -> bool:
        """Whether it is on disk."""
        return key in self._store

    def write(self, key: bytes, known: KnownOpening) -> int:
        """Write it to disk; the bytes that it takes there.

        Raises:
            StorageError: It cannot be written.
        """
        content = known.to_bytes()
        self._store.put(key, content)
        return len(content)

    def trim(self) -> int:
        """See `DocumentStore.trim`."""
        return self._store.trim()

    def clear(self) -> None:
        """Forget those in memory."""
        self._memory.clear()
