"""A model folder: its configuration, tokenizer and fingerprint."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from platformdirs import user_cache_path

from core_rerank_integrations.errors import ModelError, UnsupportedModelError, requires_extra
from core_rerank_integrations.heads.head_set import ModelShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

WEIGHT_SUFFIXES = {".safetensors", ".bin"}


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
        with requires_extra("transformers"), _without_advice():
            from transformers import AutoConfig
        try:
            config = AutoConfig.from_pretrained(self.path)
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read the configuration in {self.path}: {error}") from error
        return config.get_text_config()

    def fingerprint(self) -> str:
        """Return a digest of the configuration and of the weight files' names, sizes and times.

        Hashing the content of the weights would take longer than loading them.
        """
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for path in sorted(self.path.iterdir()):
            if path.suffix in WEIGHT_SUFFIXES:
                status = path.stat()
                digest.update(repr((path.name, status.st_size, status.st_mtime_ns)).encode())
        return digest.hexdigest()

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Load the model's fast tokenizer.

        Raises:
            ModelError: The model has only a slow tokenizer, which has no character offsets.
        """
        with requires_extra("transformers"):
            from transformers import AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(self.path)
        if not tokenizer.is_fast:
            raise ModelError(
                f"the tokenizer in {self.path} is not a fast one (no tokenizer.json), so it has no "
                "character offsets, which are needed to find documents in a prompt"
            )
        return tokenizer


@contextmanager
def _without_advice() -> Iterator[None]:
    """Hide the warning of Transformers that no model can run without PyTorch."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    given = os.environ.get(name)
    os.environ[name] = given or "1"
    try:
        yield
    finally:
        if given is None:
            del os.environ[name]


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
    """
    override = os.environ.get("CORE_RERANK_CACHE")
    folder = Path(override) if override else user_cache_path("core-rerank")
    return folder / kind
