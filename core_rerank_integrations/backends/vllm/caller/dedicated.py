"""An engine that only reranks: cut above the highest head, the fastest and the smallest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from core_rerank_integrations.backends.vllm.caller.client import EngineClient
from core_rerank_integrations.backends.vllm.request import HEADS_KEY, OPTIONS_KEY, RequestOptions
from core_rerank_integrations.errors import UnsupportedModelError, requires_extra
from core_rerank_integrations.heads.head_set import HeadSet
from core_rerank_integrations.models.local_model import LocalModel, truncated_config

with requires_extra("vllm"):
    from vllm import PoolingParams
    from vllm.config import PoolerConfig
    from vllm.inputs import TokensPrompt

    from core_rerank_integrations.backends.vllm.caller.arguments import engine_arguments
    from core_rerank_integrations.backends.vllm.compat import check_version
    from core_rerank_integrations.backends.vllm.plugin import ARCHITECTURE_PREFIX
    from core_rerank_integrations.backends.vllm.worker.pooler import TASK

TOKENS_PER_DOCUMENT = 512
"""Tokens planned for each document of a prompt, if ``max_model_len`` is not set."""
DEFAULT_DOCUMENTS = 32
"""Documents planned for a prompt if the head set does not limit them."""
MIN_CONTEXT = 2048
"""Smallest default context, because questions may be long."""


class VLLMBackend(EngineClient):
    """Compute attention mass with a vLLM engine of its own, cut above the highest head.

    Prompts of all calls, from any thread, reach the same continuous batching. Prompts with the
    same prefix, above all a question and its baseline, share it through vLLM's prefix cache.

    Args:
        model: Folder of the model.
        head_set: The heads to read.
        dtype: vLLM's name of the precision; ``auto`` is the checkpoint's own.
        engine_args: Arguments of vLLM's ``AsyncEngineArgs``. By default the engine requests half of
            the GPU's memory, and a context that holds a prompt of the head set.

    Raises:
        UnsupportedModelError: This version of vLLM, or the model in it, cannot be read exactly.
        InvalidInputError: An engine argument is unknown or not supported.
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
        arguments = dedicated_arguments(model, head_set, dtype, engine_args or {})
        super().__init__(head_set)
        self.max_context = arguments["max_model_len"]
        self._start(arguments)
        self._prepare(self._test_probes())

    async def send(
        self, ids: list[int], options: RequestOptions, read_cache: bool
    ) -> npt.NDArray[Any]:
        """See `EngineClient.send`."""
        parameters = PoolingParams(
            task=TASK,
            skip_reading_prefix_cache=not read_cache,
            extra_kwargs={OPTIONS_KEY: list(options)},
        )
        prompt = TokensPrompt(prompt_token_ids=ids)
        async for output in self.engine.encode(prompt, parameters, self._next_id()):
            result = output
        self._tokens_run += len(ids) - result.num_cached_tokens
        vector: npt.NDArray[Any] = result.outputs.data.numpy()
        return vector


def dedicated_arguments(
    model: LocalModel, head_set: HeadSet, dtype: str, engine_args: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of an engine that ends at the highest head.

    Raises:
        UnsupportedModelError: The model cannot be cut, or a head's layer has no keys of its own.
        InvalidInputError: A user's argument is unknown or not supported.
    """
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
        **engine_args.get("hf_overrides", {}),
        **truncated_config(config, num_layers),
        "architectures": [ARCHITECTURE_PREFIX + config.architectures[0]],
        HEADS_KEY: head_set.model_dump(mode="json")["heads"],
    }
    documents = head_set.scoring.documents_per_prompt or DEFAULT_DOCUMENTS
    context = max(documents * TOKENS_PER_DOCUMENT, MIN_CONTEXT)
    arguments = engine_arguments(
        model,
        {"dtype": dtype, **engine_args},
        num_layers,
        runner="pooling",
        pooler_config=PoolerConfig(task=TASK),
        hf_overrides=overrides,
    )
    return {"max_model_len": min(config.max_position_embeddings, context), **arguments}
