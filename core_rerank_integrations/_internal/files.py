"""Atomic writes, and paths of users."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from core_rerank_integrations.errors import StorageError


def expand_user(path: str | Path) -> Path:
    """Return a path with the home folder in place of ``~``.

    Raises:
        StorageError: The path begins with ``~``, and the user has no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise StorageError(f"cannot expand {str(path)!r}: {error}; give the whole path") from error


def write_atomically(path: Path, content: str | bytes, *, private: bool = False) -> None:
    """Write a file under a partial name and rename it; create its folder if needed.

    Args:
        path: The file.
        content: Its content; text is written as UTF-8.
        private: Whether only the owner can read the file and the folders that are created.

    Raises:
        StorageError: The file cannot be written, for example because the disk is full. No
            partial file is left.
    """
    # Process ids are not unique on a volume that several containers share.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        _make_folder(path.parent, private)
        try:
            partial.touch(mode=0o600 if private else 0o666, exist_ok=False)
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error}; free space or choose another folder"
        ) from error


def sync(path: Path) -> None:
    """Wait until a file and its name are on disk, where a power failure does not lose them.

    Raises:
        StorageError: The file cannot be written.
    """
    try:
        with path.open("r+b") as file:
            os.fsync(file.fileno())
        # Neither Windows nor every network file system can do this with a folder.
        with suppress(OSError):
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error}; free space or choose another folder"
        ) from error


def _make_folder(folder: Path, private: bool) -> None:
    """Create a folder and the missing ones above it, which `Path.mkdir` gives the default mode."""
    if not folder.is_dir():
        _make_folder(folder.parent, private)
        folder.mkdir(mode=0o700 if private else 0o777, exist_ok=True)
