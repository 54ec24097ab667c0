"""Comparison of the graph with the model's own attention in Transformers."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np

from core_rerank_integrations._internal.files import write_atomically
from core_rerank_integrations.backends.local.backend import PrefixRun
from core_rerank_integrations.backends.openvino.backend import OpenVINOBackend
from core_rerank_integrations.backends.openvino.decoder import Decoder
from core_rerank_integrations.errors import StorageError, UnsupportedModelError
from core_rerank_integrations.heads.head_set import HeadSet
from core_rerank_integrations.method.prompt import SharedPrefix, TokenIds
from core_rerank_integrations.method.scoring import Mass
from core_rerank_integrations.models.local_model import (
    LocalModel,
    cache_folder,
    truncated_config,
    without_load_report,
)
from core_rerank_integrations.settings import DocumentCache

TOLERANCE = 1e-3
FORMAT = 2
"""Increased when the graph or this test changes."""


def check_attention(model: LocalModel, layers: int) -> None:
    """Compare the attention of a model's first layers with Transformers' eager attention.

    The comparison takes some seconds, so it is done once for each model, and its success is kept
    in the cache folder. It needs PyTorch, and is left out without it.

    Args:
        model: The model.
        layers: Number of layers that are used. Two, or as many as show every kind of layer among
            these, are compared.

    Raises:
        UnsupportedModelError: They differ.
    """
    if find_spec("torch") is None:
        return
    versions = (version("openvino"), version("transformers"))
    identity = repr((FORMAT, model.fingerprint(), layers, versions))
    passed = cache_folder("checked") / hashlib.sha256(identity.encode()).hexdigest()[:32]
    if passed.exists():
        return
    config = model.config()
    decoder = Decoder.from_config(config, layers)
    kinds = list(zip(decoder.windows, decoder.rotaries, strict=True))
    depth = max(min(2, layers), *(kinds.index(kind) + 1 for kind in kinds))
    pairs = [(layer, head) for layer in {0, depth - 1} for head in range(decoder.heads)]
    tokens = (np.arange(1, 44) * 7919) % config.vocab_size
    prefix = SharedPrefix(tokens[:30], 5, (), (), tokens[30:])
    no_cache = DocumentCache(memory_bytes=0, disk_bytes=0)
    backend = OpenVINOBackend(
        model, HeadSet.from_pairs(pairs), dtype="float32", document_cache=no_cache
    )
    ((computed,),) = backend._forward([PrefixRun(prefix, [prefix.baseline])], keep=False)
    expected = _eager_mass(model, tokens, pairs, rows=len(tokens) - prefix.context_length)
    difference = float(np.abs(computed - expected).max())
    if not difference <= TOLERANCE:
        raise UnsupportedModelError(
            f"{model.path}: attention computed by OpenVINO differs from the model's own by "
            f"{difference:.2g}; use backend='transformers'"
        )
    with suppress(StorageError):  # It is compared again next time.
        write_atomically(passed, identity)


def _eager_mass(
    model: LocalModel, tokens: TokenIds, pairs: list[tuple[int, int]], rows: int
) -> Mass:
    """Return the mean attention of the last ``rows`` tokens, [heads, tokens], by Transformers."""
    import torch
    from transformers import AutoModel

    config = model.config()
    for name, value in truncated_config(config, max(pairs)[0] + 1).items():
        setattr(config, name, value)
    with without_load_report():
        eager = AutoModel.from_pretrained(
            model.path, config=config, dtype=torch.float32, attn_implementation="eager"
        )
    with torch.inference_mode():
        output = eager.eval()(
            torch.as_tensor(tokens)[None], use_cache=False, output_attentions=True
        )
    masses = [output.attentions[layer][0, head, -rows:].mean(dim=0) for layer, head in pairs]
    return torch.stack(masses).numpy()
