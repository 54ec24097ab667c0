"""The files of cached prefixes. Their content is bytes to this module."""

from __future__ import annotations

import hashlib
import os
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from core_rerank_integrations._internal.files import write_atomically
from core_rerank_integrations.errors import StorageError

CHECKSUM_BYTES = 4
KEPT_SHARE = 0.95
"""Share of the limit that remains when entries are dropped."""
ABANDONED_SECONDS = 3600
"""A partial file of this age belongs to a process that died."""


class DocumentStore:
    """Store entries on disk, one file each. Safe for threads, processes and crashes.

    Files are written atomically, and a file with a wrong checksum is dropped: an entry is what
    was written, or absent.

    Args:
        folder: Folder of the entries of all models.
        limit: Maximum size of all entries in bytes; `trim` drops the least recently used.
        identity: What the content of an entry depends on besides its key.
    """

    def __init__(self, folder: Path, limit: int, identity: str) -> None:
        self.folder = folder
        self._limit = limit
        self._entries = folder / hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._lock = threading.Lock()
        self._until_scan = 0

    def __contains__(self, key: bytes) -> bool:
        return self._limit > 0 and self._path(key).exists()

    def touch(self, key: bytes) -> bool:
        """Return whether there is an entry, and mark it as used now."""
        if key not in self:
            return False
        with suppress(OSError):
            os.utime(self._path(key))
        return True

    def get(self, key: bytes) -> bytes | None:
        """Return an entry's content, or ``None`` if it is absent or damaged."""
        if not self._limit:
            return None
        path = self._path(key)
        try:
            with path.open("rb") as file:
                checksum, content = file.read(CHECKSUM_BYTES), file.read()
        except OSError:
            return None
        is_whole = checksum == _checksum(content)
        with suppress(OSError):  # Reading must also work in a read-only folder.
            if is_whole:
                os.utime(path)
            else:
                path.unlink()
        return content if is_whole else None

    def put(self, key: bytes, content: bytes) -> None:
        """Write an entry.

        Raises:
            StorageError: The file cannot be written, or is larger than the limit.
        """
        if len(content) > self._limit:
            raise StorageError(
                f"a document takes {len(content)} bytes on disk, and the limit is {self._limit}: "
                "raise DocumentCache(disk_bytes=...), or set it to 0"
            )
        write_atomically(self._path(key), _checksum(content) + content, private=True)
        with self._lock:
            self._until_scan -= len(content)

    def trim(self) -> int:
        """Drop the least recently used entries if all together exceed the limit.

        The folder is only scanned when this process may have filled half of the room that the
        last scan found; other processes may fill the other half. A scan that finds no room makes
        some, so that not every call scans.

        Returns:
            Number of dropped entries.
        """
        with self._lock:
            if self._until_scan > 0:
                return 0
            files = sorted(self._files())
            size = sum(size for _, size, _ in files)
            dropped = 0
            if size > self._limit:
                for _, file_size, path in files:
                    if size <= self._limit * KEPT_SHARE:
                        break
                    with suppress(OSError):
                        path.unlink()
                        dropped += 1
                    size -= file_size
            self._until_scan = (self._limit - size) // 2
            return dropped

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Yield the time of last use, the size and the path of each entry."""
        for path in self.folder.glob("*/*/*"):
            try:
                status = path.stat()
                if path.suffix == ".partial":
                    if time.time() - status.st_mtime > ABANDONED_SECONDS:
                        path.unlink()
                    continue
            except OSError:  # Another process has deleted it.
                continue
            yield status.st_mtime, status.st_size, path

    def _path(self, key: bytes) -> Path:
        name = key.hex()
        return self._entries / name[:2] / name


def last_changes(folder: Path) -> list[tuple[str, int]]:
    """Return when entries were last added to or dropped from each part of a store's folder."""
    changes = []
    for part in folder.glob("*/*"):
        with suppress(OSError):  # Another process has deleted it.
            changes.append((str(part), part.stat().st_mtime_ns))
    return sorted(changes)


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(CHECKSUM_BYTES)
