"""Adapters of head sets: LoRA in PEFT's files, merged into a model by NumPy."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from core_rerank_integrations._internal.files import expand_user
from core_rerank_integrations._internal.warnings import warn_caller
from core_rerank_integrations.errors import HeadSetError, ModelError, UnsupportedModelError
from core_rerank_integrations.heads.head_set import HUB_ID, HeadSet
from core_rerank_integrations.heads.scoring_config import Count, Finite
from core_rerank_integrations.models.build_once import build_once
from core_rerank_integrations.models.hub import hub_folder
from core_rerank_integrations.models.local_model import (
    LocalModel,
    cache_folder,
    truncated_config,
)
from core_rerank_integrations.models.safetensors_files import (
    STORED_AS,
    NewTensor,
    StoredTensor,
    decoder_prefix,
    from_float32,
    stored_tensors,
    to_float32,
    write_safetensors,
)

log = logging.getLogger(__name__)

MERGING = 1
"""Increased when the result of a merge changes."""
CONFIG, WEIGHTS = ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
TOKENIZER_FILES = ("*token*.json", "vocab*", "merges.txt", "chat_template*", "*.model")
PAIR = re.compile(r"base_model\.model\.(?:model\.)?(.+)\.lora_([AB])\.weight")
"""Name of a tensor of an adapter. The second ``model.`` is that of a model with an LM head."""
LAYER = re.compile(r"layers\.(\d+)\.")
CHUNK = 1 << 22
"""Maximum number of weights that are computed at a time."""

WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "task_type",
}
"""Settings of PEFT that do not change what a trained adapter does, beside its tensors."""


class _LoraConfig(BaseModel):
    """What an adapter's configuration may say. Settings that are not named here must be empty."""

    model_config = ConfigDict(extra="allow")

    peft_type: Literal["LORA"]
    r: Count
    lora_alpha: Finite
    use_rslora: bool = False
    bias: Literal["none"] = "none"
    # Others, such as "pissa", change the base model's weights before the training.
    init_lora_weights: Literal[True, False, "gaussian", "orthogonal", "eva"] | None = True


@dataclass(frozen=True)
class _Lora:
    """An adapter.

    Attributes:
        folder: Its folder.
        scale: Factor of its products.
        rank: Number of rows of A, and of columns of B.
        pairs: The tensors A [rank, in] and B [out, rank] by the name of a matrix in the decoder.
    """

    folder: Path
    scale: float
    rank: int
    pairs: Mapping[str, tuple[StoredTensor, StoredTensor]]

    def merged(self, name: str, base: StoredTensor) -> npt.NDArray[Any]:
        """Return the numbers of a matrix, with the product of its pair if it has one."""
        stored = base.mapped()
        if name not in self.pairs:
            return stored
        a, b = (to_float32(item.mapped(), item.dtype) for item in self.pairs[name])
        b *= np.float32(self.scale)
        rounded = np.empty(stored.shape, stored.dtype)
        rows = max(CHUNK // base.shape[1], 1)
        for start in range(0, base.shape[0], rows):
            part = slice(start, start + rows)
            full = to_float32(stored[part], base.dtype) + b[part] @ a
            rounded[part] = from_float32(full, base.dtype)
        return rounded


def with_adapter(
    model: LocalModel,
    heads: HeadSet,
    *,
    token: str | None = None,
    local_files_only: bool = False,
) -> LocalModel:
    """Return the model whose weights the adapter of a head set has changed.

    It is merged once, into a folder in this package's cache, and cut to the adapter's layers.

    Args:
        model: The model on which the adapter was trained; itself the result if there is no adapter.
        heads: The head set. It was checked against the model.
        token: Access token of the Hugging Face hub; by default the one that is stored here.
        local_files_only: Whether nothing may be downloaded.

    Raises:
        HeadSetError: The adapter was trained on another model.
        ModelError: The adapter cannot be found or downloaded, is damaged, or is no plain LoRA.
        UnsupportedModelError: The model cannot be cut, or its weights are quantised.
        StorageError: The cache cannot be written.
    """
    if heads.adapter is None:
        return model
    lora = _read(adapter_folder(heads.adapter.path, token, local_files_only))
    layers = heads.adapter.layers
    config = _cut_config(model, layers)
    decoder = _decoder(model)
    _check_fit(lora, decoder, model)
    checksum = model.weights_checksum()
    _check_base(model, heads, checksum)
    copied = sorted({path for pattern in TOKENIZER_FILES for path in model.path.glob(pattern)})
    tensors = [
        NewTensor(f"model.{name}", tensor.dtype, tensor.shape, partial(lora.merged, name, tensor))
        for name, tensor in decoder.items()
        if (layer := LAYER.match(name)) is None or int(layer[1]) < layers
    ]

    def build(_: Path, target: Path) -> None:
        log.info("Merging the adapter %s into %s ...", lora.folder, model.path)
        target.mkdir()
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for path in copied:
            shutil.copyfile(path, target / path.name)
        write_safetensors(target / "model.safetensors", tensors)

    identity = hashlib.sha256(
        repr((MERGING, checksum, adapter_checksum(lora.folder), layers)).encode()
    )
    for path in (model.path / "config.json", *copied):
        identity.update(f"{path.name}={hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    folder = cache_folder() / f"merged-{identity.hexdigest()[:32]}"
    return LocalModel(build_once(folder, build), model.model_id)


def check_mergeable(model: LocalModel) -> None:
    """Check that adapters can be merged into a model.

    Raises:
        ModelError: It has no weights in safetensors files.
        UnsupportedModelError: It cannot be cut, or its weights are quantised.
    """
    _cut_config(model, 1)
    _decoder(model)
    model.weights_checksum()


def adapter_checksum(folder: Path) -> str:
    """Return a digest of an adapter's files."""
    digest = hashlib.sha256()
    for name in ADAPTER_FILES:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def adapter_folder(path: str, token: str | None = None, local_files_only: bool = False) -> Path:
    """Return the folder of an adapter, which is downloaded if ``path`` is a hub id.

    Raises:
        ModelError: It cannot be downloaded.
    """
    folder = expand_user(path)
    if not HUB_ID.fullmatch(path) or folder.is_dir():
        return folder
    hub_id, _, revision = path.partition("@")

    def missing(folder: Path) -> str | None:
        return next((name for name in ADAPTER_FILES if not (folder / name).exists()), None)

    return hub_folder(
        hub_id,
        ADAPTER_FILES,
        missing,
        otherwise="no folder with an adapter",
        revision=revision or None,
        token=token,
        local_files_only=local_files_only,
    )


def _read(folder: Path) -> _Lora:
    try:
        config = _LoraConfig.model_validate_json((folder / CONFIG).read_bytes())
    except OSError as error:
        raise ModelError(f"cannot read the adapter in {folder}: {error}") from error
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, item['loc']))}: {item['msg']} ({shortened(item['input'])})"
            for item in error.errors()
        ]
        raise _unusable(folder, "; ".join(problems)) from error
    for name, value in (config.model_extra or {}).items():
        if value and name not in WITHOUT_EFFECT:
            raise _unusable(folder, f"{name} is {shortened(value)}")
    halves: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in stored_tensors([folder / WEIGHTS]).items():
        match = PAIR.fullmatch(name)
        if not match or tensor.dtype not in STORED_AS:
            raise _unusable(folder, f"it holds {name}, of type {tensor.dtype}")
        if not np.isfinite(to_float32(tensor.mapped(), tensor.dtype)).all():
            raise _unusable(folder, f"{name} holds numbers that are not finite")
        halves.setdefault(f"{match[1]}.weight", {})[match[2]] = tensor
    for name, pair in halves.items():
        if len(pair) != 2:
            raise _unusable(folder, f"one of the two matrices of {name} is missing")
    return _Lora(
        folder,
        config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r),
        config.r,
        {name: (pair["A"], pair["B"]) for name, pair in halves.items()},
    )


def _unusable(folder: Path, problem: str) -> ModelError:
    return ModelError(
        f"the adapter in {folder} cannot be merged: {problem}. Use plain LoRA of linear layers, as "
        "PEFT saves it"
    )


def _cut_config(model: LocalModel, layers: int) -> dict[str, Any]:
    """Return what the model's ``config.json`` says, for its first layers.

    Raises:
        UnsupportedModelError: The model cannot be cut, or has other parts than a decoder.
    """
    written: dict[str, Any] = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
    config = model.config()
    if written.get("model_type") != config.model_type:
        raise UnsupportedModelError(
            f"{model.path} holds a model of several parts ({written.get('model_type')}), and "
            "adapters are merged into decoders alone"
        )
    return written | truncated_config(config, layers)


def _decoder(model: LocalModel) -> dict[str, StoredTensor]:
    """Return the weights of the decoder, without the LM head, by their names in it.

    Raises:
        ModelError: There are none.
        UnsupportedModelError: They are quantised.
    """
    weights = model.weights()
    prefix = decoder_prefix(weights, model.path)
    decoder = {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.items()
        if name.startswith(prefix) and not name.startswith("lm_head.")
    }
    for name, tensor in decoder.items():
        if tensor.dtype not in STORED_AS:
            raise UnsupportedModelError(
                f"{name} of {model.path} has the type {tensor.dtype}, and adapters are merged into "
                f"weights of type {', '.join(STORED_AS)} alone; use the model that is not quantised"
            )
    return decoder


def _check_fit(lora: _Lora, decoder: Mapping[str, StoredTensor], model: LocalModel) -> None:
    """Check that the model has each matrix that the adapter changes, in its shape.

    Raises:
        HeadSetError: It does not.
    """
    for name, (a, b) in lora.pairs.items():
        shape = decoder[name].shape if name in decoder else ()
        if len(shape) != 2 or (a.shape, b.shape) != ((lora.rank, shape[1]), (shape[0], lora.rank)):
            raise HeadSetError(
                f"the adapter in {lora.folder} was trained on another model than {model.path}: it "
                f"changes {name} by matrices of shapes {b.shape} and {a.shape} (rank {lora.rank}), "
                + (f"and there its shape is {shape}" if shape else "and there is none")
            )


def _check_base(model: LocalModel, heads: HeadSet, checksum: str) -> None:
    """Check that the adapter was trained on these weights.

    Raises:
        HeadSetError: It was not, and they are no copy of the head set's model.
    """
    if heads.adapter is None or checksum in heads.adapter.base_checksums:
        return
    if heads.model is not None and model.model_id in (heads.model, *heads.model_aliases):
        warn_caller(
            f"the adapter of the head set {heads.name!r} was trained on another copy of "
            f"{model.model_id} than that in {model.path}, so rankings and probabilities differ "
            f"from those that were measured. If that is intended, add the copy's checksum to the "
            f"adapter's base_checksums: {checksum}"
        )
        return
    raise HeadSetError(
        f"the adapter of the head set {heads.name!r} was trained on other weights than those in "
        f"{model.path}: use {heads.model or 'the model on which it was trained'}, or add their "
        f"checksum to the adapter's base_checksums: {checksum}"
    )
