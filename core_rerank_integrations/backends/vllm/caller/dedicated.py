"""An engine that only reranks: cut above the highest head, the fastest and the smallest."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from core_rerank_integrations.backends.vllm.caller.client import EngineClient
from core_rerank_integrations.backends.vllm.request import HEADS_KEY, OPTIONS_KEY, RequestOptions
from core_rerank_integrations.errors import (
    InvalidInputError,
    UnsupportedModelError,
    requires_extra,
)
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

EXTERNAL_BALANCING = (
    "data_parallel_external_lb",
    "data_parallel_hybrid_lb",
    "data_parallel_rank",
    "data_parallel_start_rank",
)
"""Arguments for data parallel engines that another program starts and balances."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Where configurations of mixtures say the number of their experts."""
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
        super().__init__(head_set, engines=arguments.get("data_parallel_size") or 1)
        self.max_context = arguments["max_model_len"]
        self._start(arguments)
        self._prepare(self._test_probes())

    async def send(
        self, ids: list[int], options: RequestOptions, read_cache: bool, rank: int
    ) -> npt.NDArray[Any]:
        """See `EngineClient.send`.

        Raises:
            CancelledError: The caller was cancelled; the engine then drops the request.
        """
        parameters = PoolingParams(
            task=TASK,
            skip_reading_prefix_cache=not read_cache,
            extra_kwargs={OPTIONS_KEY: list(options)},
        )
        prompt = TokensPrompt(prompt_token_ids=ids)
        engine = self.engine
        # `AsyncLLM.encode` cannot name the engine of data parallel ones.
        queue = await engine.add_request(
            self._next_id(), prompt, parameters, data_parallel_rank=rank
        )
        try:
            result = await queue.get()
        except asyncio.CancelledError:
            await engine.abort(queue.request_id, internal=True)
            raise
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
    _check_data_parallelism(config, engine_args)
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


def _check_data_parallelism(config: Any, engine_args: Mapping[str, Any]) -> None:
    for name in EXTERNAL_BALANCING:
        value = engine_args.get(name)
        if value is not None and value is not False:  # Rank 0 is a value.
            raise InvalidInputError(
                f"{name}={value!r}: a reranker starts all of its data parallel engines "
                "and chooses among them; set data_parallel_size alone"
            )
    size = engine_args.get("data_parallel_size") or 1
    if size > 1 and any(getattr(config, name, None) for name in EXPERTS):
        raise InvalidInputError(
            f"data_parallel_size={size}: the engines of a mixture of experts run in step, which "
            "reranking does not support; use tensor_parallel_size, or a reranker for each GPU"
        )
