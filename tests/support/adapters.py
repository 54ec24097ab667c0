"""Small random adapters, in the files that PEFT writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from core_rerank_integrations.heads.head_set import Adapter, HeadSet
from core_rerank_integrations.models.local_model import LocalModel

ALPHA, RANK = 6, 2


def write_adapter(
    folder: Path, model: LocalModel, *, module: str = "model.", size: float = 0.1, **settings: Any
) -> dict[str, np.ndarray[Any, Any]]:
    """Write an adapter of all matrices in the layers of a model.

    Args:
        folder: Its folder.
        model: The model.
        module: What the names of its modules begin with.
        size: Standard deviation of its numbers.
        **settings: Changes of its configuration.

    Returns:
        What B @ A adds to each tensor of the model, without the scale.
    """
    generator = np.random.default_rng(0)
    tensors, products = {}, {}
    for name, tensor in model.weights().items():
        if len(tensor.shape) == 2 and "layers." in name:
            rows, columns = tensor.shape
            a = generator.normal(0, size, (RANK, columns)).astype(np.float32)
            b = generator.normal(0, size, (rows, RANK)).astype(np.float32)
            inner = name.removeprefix("model.").removesuffix(".weight")
            tensors[f"base_model.model.{module}{inner}.lora_A.weight"] = a
            tensors[f"base_model.model.{module}{inner}.lora_B.weight"] = b
            products[name] = b @ a
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return products


def adapted(heads: HeadSet, folder: Path, model: LocalModel, layers: int) -> HeadSet:
    """Return a head set with an adapter that was trained on a model."""
    adapter = Adapter(path=str(folder), base_checksums=(model.weights_checksum(),), layers=layers)
    return heads.model_copy(update={"adapter": adapter})
