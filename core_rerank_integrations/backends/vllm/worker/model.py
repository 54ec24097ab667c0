"""vLLM's decoders with probes: resolved by name, as ``CoRe<Architecture>``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.models.adapters import as_embedding_model
from vllm.model_executor.models.registry import ModelRegistry

from core_rerank_integrations.backends.vllm.plugin import ARCHITECTURE_PREFIX
from core_rerank_integrations.backends.vllm.request import HEADS_KEY
from core_rerank_integrations.backends.vllm.worker.pooler import CoRePooler
from core_rerank_integrations.heads.head_set import HeadSet

FEED_FORWARD = ("mlp", "block_sparse_moe", "feed_forward")
"""Names of a layer's module after the attention, which may hold the experts of a mixture."""


def as_core_model(original: type) -> type:
    """Return a pooling model of a decoder that ends after the attention of its last layer."""

    class CoReModel(as_embedding_model(original)):  # type: ignore[misc]
        def _init_pooler(self, vllm_config: Any, prefix: str = "") -> CoRePooler:  # noqa: ARG002
            self._last_layer = vllm_config.model_config.hf_text_config.num_hidden_layers - 1
            for name, module in self.named_modules():
                if name.endswith(f"layers.{self._last_layer}"):
                    for part in FEED_FORWARD:
                        if hasattr(module, part):
                            setattr(module, part, nn.Identity())
            heads = getattr(vllm_config.model_config.hf_config, HEADS_KEY)
            return CoRePooler(vllm_config, HeadSet(heads=heads))

        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
            return super().load_weights(
                (name, tensor) for name, tensor in weights if self._is_kept(name)
            )

        def _is_kept(self, name: str) -> bool:
            layer = re.search(r"\blayers\.(\d+)\.(\w+)", name)
            if layer is None:
                return not name.startswith("lm_head")
            number, is_dropped = int(layer[1]), layer[2] in FEED_FORWARD
            return number < self._last_layer or (number == self._last_layer and not is_dropped)

    return CoReModel


def __getattr__(name: str) -> Any:
    architecture = name.removeprefix(ARCHITECTURE_PREFIX)
    if architecture == name or architecture not in ModelRegistry.models:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    model = as_core_model(ModelRegistry.models[architecture].load_model_cls())
    model.__name__ = model.__qualname__ = name
    model.__module__ = __name__
    globals()[name] = model
    return model
