"""Model folders that are made on this machine."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from core_rerank_integrations.errors import StorageError

log = logging.getLogger(__name__)

MANIFEST = "files.json"
"""The file with the names and sizes of the files in a folder that was made here."""


def is_whole(folder: Path) -> bool:
    """Return whether such a folder has all its files in their full size."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def build_once(folder: Path, build: Callable[[Path, Path], None]) -> Path:
    """Return ``folder``; unless it is whole, create it by ``build(working folder, target)``.

    The folder appears complete or not at all, and every user can read its files. A lock lets one
    of several processes do the work, and the files of an interrupted one are deleted.

    Raises:
        StorageError: The cache cannot be written, for example because the disk is full.
    """
    if is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{folder.name}.lock"):
            if not is_whole(folder):
                work = folder.parent / f".{folder.name}.partial"
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
                try:
                    build(work, work / "model")
                    _finish(work / "model")
                    if folder.exists():
                        log.warning("%s was damaged; it is made again.", folder)
                        shutil.rmtree(folder)
                    (work / "model").rename(folder)
                finally:
                    shutil.rmtree(work, ignore_errors=True)
                log.info("Stored in %s", folder)
    except OSError as error:
        raise StorageError(
            f"cannot store a model in {folder}: {error}. Free space there, or set the environment "
            "variable CORE_RERANK_CACHE to another folder"
        ) from error
    return folder


def _finish(target: Path) -> None:
    """Write the manifest of a new folder, and let every user read it."""
    files = sorted(target.iterdir())
    manifest = target / MANIFEST
    manifest.write_text(json.dumps({path.name: path.stat().st_size for path in files}))
    for path in (*files, manifest):
        path.chmod(0o644)
    target.chmod(0o755)
