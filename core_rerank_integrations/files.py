"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from core_rerank_integrations.errors import StorageError


def partial_path(path: Path) -> Path:
    """Where this thread writes what is to appear at ``path``."""
    writer = f"{os.getpid()}-{threading.get_native_id()}"
    return path.with_name(f".{path.name}.{writer}.partial")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside its place and rename it there, making its folder if needed.

    Raises:
        StorageError: It cannot be written, say because the disk is full; nothing is left.
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
