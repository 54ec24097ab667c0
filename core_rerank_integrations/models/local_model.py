"""A model folder: its configuration, tokenizer and fingerprint."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from platformdirs import user_cache_path

from core_rerank_integrations._internal.files import expand_user
from core_rerank_integrations.errors import (
    ModelError,
    StorageError,
    UnsupportedModelError,
    requires_extra,
)
from core_rerank_integrations.heads.head_set import ModelShape
from core_rerank_integrations.models.safetensors_files import StoredTensor, stored_tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

WEIGHT_SUFFIXES = {".safetensors", ".bin"}
MAX_HASHED_BYTES = 300_000_000
"""Maximum of a model's weights that are hashed when it is loaded, which takes 0.3 s."""
HASHED_BLOCK = 1 << 16


@dataclass(frozen=True)
class LocalModel:
    """A model folder that Transformers and vLLM can load.

    Attributes:
        path: The folder.
        model_id: Hub id, if known. Head sets are found by it.
    """

    path: Path
    model_id: str | None

    def config(self) -> PretrainedConfig:
        """Read the decoder's configuration (for a multimodal model, of its text part).

        Raises:
            ModelError: The configuration cannot be read.
        """
        with requires_extra("transformers"), without_advice():
            # Waits for a thread that imports it: the module that replaces it has this name.
            import transformers  # noqa: F401
            from transformers import AutoConfig
        try:
            config = AutoConfig.from_pretrained(self.path)
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read the configuration in {self.path}: {error}") from error
        return config.get_text_config()

    def fingerprint(self) -> str:
        """Return a digest of the configuration and the weights.

        It depends on content alone, so that a copy of the folder has the same one. Weights of
        more than `MAX_HASHED_BYTES` are represented by blocks at even distances, unless their
        checksum is known from the hub.
        """
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        weights = sorted(path for path in self.path.iterdir() if path.suffix in WEIGHT_SUFFIXES)
        total = sum(path.stat().st_size for path in weights)
        for path in weights:
            blob = path.resolve()
            # The hub's cache names a file by its checksum.
            is_named = path.is_symlink() and blob.parent.name == "blobs"
            content = blob.name if is_named else _hash(path, 0, path.stat().st_size, total)
            digest.update(f"{path.name}={content}\n".encode())
        return digest.hexdigest()

    def weights(self) -> dict[str, StoredTensor]:
        """Return the tensors of the safetensors files by name.

        Raises:
            ModelError: There are none, or a file is damaged.
        """
        tensors = stored_tensors(sorted(self.path.glob("*.safetensors")))
        if not tensors:
            raise ModelError(f"{self.path} holds no weights in safetensors files")
        return tensors

    def weights_checksum(self) -> str:
        """Return a digest of the weights alone: names, types, shapes and numbers.

        It does not depend on the number of files and the order in them. Of more than
        `MAX_HASHED_BYTES`, it reads blocks at even distances in each tensor.

        Raises:
            ModelError: There are no safetensors files, or one is damaged.
        """
        tensors = self.weights()
        total = sum(tensor.size for tensor in tensors.values())
        digest = hashlib.sha256()
        for name, tensor in sorted(tensors.items()):
            content = _hash(tensor.path, tensor.start, tensor.size, total)
            digest.update(f"{name} {tensor.dtype} {tensor.shape}={content}\n".encode())
        return digest.hexdigest()

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Load the model's fast tokenizer.

        Raises:
            ModelError: The tokenizer cannot be read, or it is a slow one, which has no character
                offsets.
        """
        with requires_extra("transformers"):
            from transformers import AutoTokenizer
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path)
        except Exception as error:  # The tokenizers library raises no other type.
            raise ModelError(f"cannot read the tokenizer in {self.path}: {error}") from error
        if not tokenizer.is_fast:
            raise ModelError(
                f"the tokenizer in {self.path} is not a fast one (no tokenizer.json), so it has no "
                "character offsets, which are needed to find documents in a prompt"
            )
        return tokenizer


@contextmanager
def without_advice() -> Iterator[None]:
    """Hide the warning of Transformers that no model can run without PyTorch."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    given = os.environ.get(name)
    os.environ[name] = given or "1"
    try:
        yield
    finally:
        if given is None:
            os.environ.pop(name, None)  # Another thread may have.


@contextmanager
def without_load_report() -> Iterator[None]:
    """Hide Transformers' report of unused weights: those of the dropped layers."""
    logger = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def model_shape(config: PretrainedConfig) -> ModelShape:
    """Return the shape that head sets are checked against."""
    return ModelShape(config.num_hidden_layers, config.num_attention_heads, config.model_type)


def truncated_config(config: PretrainedConfig, num_layers: int) -> dict[str, Any]:
    """Return the changes that reduce a configuration to its first ``num_layers`` layers.

    Raises:
        UnsupportedModelError: The model has weights of all its layers in one matrix.
    """
    total = config.num_hidden_layers
    if num_layers < total and getattr(config, "hidden_size_per_layer_input", None):
        raise UnsupportedModelError(
            f"models of type {config.model_type!r} keep the embeddings of all their layers in one "
            "matrix, so the layers above the highest head cannot be removed; use "
            "backend='vllm-shared', which runs the whole model"
        )
    per_layer = {
        name: value[:num_layers]
        for name, value in vars(config).items()
        if "layer" in name and isinstance(value, list) and len(value) == total
    }
    settings = {**per_layer, "num_hidden_layers": num_layers}
    if shared := getattr(config, "num_kv_shared_layers", None):
        # This many layers at the end share the keys of earlier layers.
        settings["num_kv_shared_layers"] = max(num_layers - (total - shared), 0)
    return settings


def cache_folder(kind: str = "models") -> Path:
    """Return the package's cache folder for one kind of files.

    It is inside ``$CORE_RERANK_CACHE``, or inside the user's cache folder if that is not set.

    Raises:
        StorageError: ``CORE_RERANK_CACHE`` is not set, and the user has no home folder.
    """
    override = os.environ.get("CORE_RERANK_CACHE")
    if override:
        return expand_user(override) / kind
    try:
        return user_cache_path("core-rerank").expanduser() / kind
    except RuntimeError as error:
        raise StorageError(
            "this user has no home folder for models and cached documents: set the environment "
            "variable CORE_RERANK_CACHE to a folder"
        ) from error


def _hash(path: Path, begin: int, size: int, total: int) -> str:
    """Return a digest of a part of a file, which belongs to ``total`` bytes of weights."""
    is_sampled = total > MAX_HASHED_BYTES
    digest = hashlib.sha256(str(size).encode() if is_sampled else b"")
    step = max(total * HASHED_BLOCK // MAX_HASHED_BYTES, HASHED_BLOCK)
    starts = [*range(0, size, step), *([max(size - HASHED_BLOCK, 0)] if is_sampled else [])]
    with path.open("rb") as file:
        for start in starts:
            file.seek(begin + start)
            digest.update(file.read(min(HASHED_BLOCK, size - start)))
    return digest.hexdigest()
