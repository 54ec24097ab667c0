"""What is kept of documents that were read: how much of it, where, and the files of those on disk.

Files are bytes to this module; what they mean is their backend's to know.
"""

from __future__ import annotations

import hashlib
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_serializer

from core_rerank_integrations.errors import StorageError
from core_rerank_integrations.files import write_whole

CHECKSUM_BYTES = 4
ABANDONED_SECONDS = 3600
"""A file that has been half-written for so long belongs to a process that died."""


class DocumentCache(BaseModel):
    """How much is kept of documents that were read, so that a question costs its own tokens alone.

    Every document that is ranked stays known in memory; `CoReReranker.remember` also writes what
    it reads to disk, where any later process finds it. What was not asked about for longest goes
    first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    memory_bytes: int = Field(
        default=1 << 30, ge=0, description="Memory for documents, on the device; 0 keeps none."
    )
    disk_bytes: int = Field(
        default=32 << 30,
        ge=0,
        description="Disk space for remembered documents of all models; 0: none is used.",
    )
    folder: Path | None = Field(
        default=None,
        description="Where remembered documents lie; None: 'documents' in the package's cache.",
    )

    @field_serializer("folder")
    def _folder_as_text(self, folder: Path | None) -> str | None:
        return None if folder is None else str(folder)


class DocumentStore:
    """Entries on disk, one file each. Safe for several threads and processes, and after a crash.

    A file appears whole or not at all, and one whose checksum is wrong is dropped: an entry is
    what was put there, or absent.

    Args:
        folder: Where entries of all models lie.
        limit: Bytes they may take; `trim` drops those unused for longest.
        identity: What the content of an entry depends on besides its key.
    """

    def __init__(self, folder: Path, limit: int, identity: str) -> None:
        self.folder = folder
        self._limit = limit
        self._entries = folder / hashlib.sha256(identity.encode()).hexdigest()[:16]

    def __contains__(self, key: bytes) -> bool:
        return self._limit > 0 and self._path(key).exists()

    def touch(self, key: bytes) -> bool:
        """Whether there is such an entry; it then counts as used just now."""
        if key not in self:
            return False
        with suppress(OSError):
            os.utime(self._path(key))
        return True

    def get(self, key: bytes) -> memoryview | None:
        """An entry's content; ``None`` if there is none that can be read."""
        if not self._limit:
            return None
        path = self._path(key)
        try:
            content = memoryview(path.read_bytes())
        except OSError:
            return None
        checksum, content = content[:CHECKSUM_BYTES], content[CHECKSUM_BYTES:]
        is_whole = bytes(checksum) == _checksum(content)
        with suppress(OSError):  # A folder that cannot be written to can be read all the same.
            if is_whole:
                os.utime(path)
            else:
                path.unlink()
        return content if is_whole else None

    def put(self, key: bytes, content: bytes) -> None:
        """Write an entry.

        Raises:
            StorageError: It cannot be written, or is larger than all entries may be.
        """
        if len(content) > self._limit:
            raise StorageError(
                f"a document takes {len(content)} bytes on disk, and all may take {self._limit}: "
                "raise DocumentCache(disk_bytes=...), or set it to 0"
            )
        write_whole(self._path(key), _checksum(content) + content)

    def trim(self) -> int:
        """Drop what was not used for longest until the rest is within the limit.

        Returns:
            How many entries went.
        """
        found = sorted(self._files())
        excess = sum(size for _, size, _ in found) - self._limit
        dropped = 0
        for _, size, path in found:
            if excess <= 0:
                break
            with suppress(OSError):
                path.unlink()
                dropped += 1
            excess -= size
        return dropped

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """When each was used last, its size, and where it is."""
        for path in self.folder.glob("*/*/*"):
            try:
                status = path.stat()
                if path.suffix == ".partial":
                    if time.time() - status.st_mtime > ABANDONED_SECONDS:
                        path.unlink()
                    continue
            except OSError:  # Another process was faster.
                continue
            yield status.st_mtime, status.st_size, path

    def _path(self, key: bytes) -> Path:
        name = hashlib.sha256(key).hexdigest()
        return self._entries / name[:2] / name


def _checksum(content: bytes | memoryview) -> bytes:
    return zlib.crc32(content).to_bytes(CHECKSUM_BYTES)
