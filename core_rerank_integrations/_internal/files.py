"""Atomic writes."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from core_rerank_integrations.errors import StorageError


def partial_path(path: Path) -> Path:
    """Return the path to which this thread writes ``path`` before the rename."""
    writer = f"{os.getpid()}-{threading.get_native_id()}"
    return path.with_name(f".{path.name}.{writer}.partial")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file under a partial name and rename it; create its folder if needed.

    Raises:
        StorageError: The file cannot be written, for example because the disk is full. No
            partial file is left.
    """
    partial = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error}") from error
