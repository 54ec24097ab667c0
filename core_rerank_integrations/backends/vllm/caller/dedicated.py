"""An engine that only reranks: cut above the highest head, the fastest and the smallest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from core_rerank_integrations.backends.vllm.caller.client import EngineClient
from core_rerank_integrations.backends.vllm.request import HEADS_KEY
from core_rerank_integrations.errors import UnsupportedModelError, requires_extra
from core_rerank_integrations.heads.head_set import HeadSet
from core_rerank_integrations.models.resolve import LocalModel, first_layers

with requires_extra("vllm"):
    from vllm import PoolingParams
    from vllm.config import PoolerConfig
    from vllm.inputs import TokensPrompt
    from vllm.v1.engine.async_llm import AsyncLLM

    from core_rerank_integrations.backends.vllm.caller.arguments import (
        cuda_arguments,
        engine_arguments,
    )
    from core_rerank_integrations.backends.vllm.compat import check_version
    from core_rerank_integrations.backends.vllm.plugin import ARCHITECTURE_PREFIX
    from core_rerank_integrations.backends.vllm.worker.pooler import TASK

TOKENS_PER_DOCUMENT = 512
"""Room planned for a document of the head set's window, where no ``max_model_len`` is given."""
DEFAULT_WINDOW = 32
LEAST_CONTEXT = 2048
"""However small the window: questions may be long."""


class VLLMBackend(EngineClient):
    """CoRe attention mass from a vLLM engine of its own, cut above the highest head.

    Prompts of all calls, from any thread, reach the same continuous batching; prompts that
    share a prefix share it through vLLM's prefix cache, the ``N/A`` baseline first of all.

    Args:
        model: The model's folder.
        head_set: The heads to read.
        dtype: As vLLM names it; ``auto`` is the checkpoint's own.
        engine_args: Any of vLLM's `AsyncEngineArgs`. By default half of the GPU's memory is
            asked for, and a context that holds the head set's window.

    Raises:
        UnsupportedModelError: This vLLM, or what it would run, cannot be read exactly.
        InvalidInputError: An engine argument is unknown, or asks for what is not supported.
        BackendError: The engine did not start.
    """

    def __init__(
        self,
        model: LocalModel,
        head_set: HeadSet,
        *,
        dtype: str = "auto",
        engine_args: Mapping[str, Any] | None = None,
    ) -> None:
        check_version()
        arguments = _arguments(model, head_set, dtype, engine_args or {})
        super().__init__(len(head_set.heads))
        self.max_context: int = arguments["max_model_len"]
        self._start(arguments)
        try:
            self._wait_for(self._test_probes())
        except BaseException:
            self.close()
            raise

    def _release_engine(self) -> None:
        self._shut_down()

    async def _ask(
        self, engine: AsyncLLM, tokens: TokensPrompt, options: Mapping[str, Any], read_cache: bool
    ) -> np.ndarray[Any, Any]:
        parameters = PoolingParams(
            task=TASK, skip_reading_prefix_cache=not read_cache, extra_kwargs=dict(options)
        )
        async for output in engine.encode(tokens, parameters, self._next_id()):
            result = output
        vector: np.ndarray[Any, Any] = result.outputs.data.numpy()
        return vector


def _arguments(
    model: LocalModel, head_set: HeadSet, dtype: str, given: Mapping[str, Any]
) -> dict[str, Any]:
    config = model.config()
    if not config.architectures:
        raise UnsupportedModelError(
            f"{model.path} holds a model of several parts ({config.model_type}), of which the "
            "decoder cannot be cut out for an engine of its own; an engine that generates runs it "
            "whole: backend='vllm-shared'"
        )
    num_layers = head_set.highest_layer + 1
    own_keys = config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", None) or 0)
    if num_layers > own_keys:
        raise UnsupportedModelError(
            f"layer {head_set.highest_layer} of {model.path} has no keys of its own: from layer "
            f"{own_keys} on they are those of layers before, and vLLM does not keep them twice. "
            "Choose heads below, or backend='transformers'"
        )
    overrides = {
        **first_layers(config, num_layers),
        "architectures": [ARCHITECTURE_PREFIX + config.architectures[0]],
        HEADS_KEY: [[head.layer, head.head, head.weight] for head in head_set.heads],
    }
    room = max((head_set.scoring.window or DEFAULT_WINDOW) * TOKENS_PER_DOCUMENT, LEAST_CONTEXT)
    return engine_arguments(
        given,
        own={
            "dtype": dtype,
            **cuda_arguments(model, dtype, given, num_layers),
            "max_model_len": min(config.max_position_embeddings, room),
        },
        fixed={
            "model": str(model.path),
            "runner": "pooling",
            "pooler_config": PoolerConfig(task=TASK),
            "hf_overrides": {**given.get("hf_overrides", {}), **overrides},
        },
    )
