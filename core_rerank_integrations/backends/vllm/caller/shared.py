"""An engine that generates answers, and reranks with the same weights."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from core_rerank_integrations.backends.vllm.caller.client import EngineClient
from core_rerank_integrations.backends.vllm.request import (
    OPTIONS_KEY,
    TRAILING_TOKENS,
    RequestOptions,
)
from core_rerank_integrations.errors import (
    HeadSetError,
    InvalidInputError,
    UnsupportedModelError,
    requires_extra,
)
from core_rerank_integrations.heads.head_set import HeadSet
from core_rerank_integrations.models.local_model import LocalModel, model_shape

with requires_extra("vllm"):
    from vllm import RequestOutput, SamplingParams
    from vllm.inputs import TextPrompt, TokensPrompt
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    from core_rerank_integrations.backends.vllm.caller.arguments import (
        CPU_BLOCK_SIZE,
        cuda_arguments,
        engine_arguments,
        parsed_arguments,
        refuse_parallelism,
    )
    from core_rerank_integrations.backends.vllm.compat import check_version

WORKER_EXTENSION = "core_rerank_integrations.backends.vllm.worker.CoReWorkerExtension"
"""The ``worker_extension_cls`` of every engine that a reranker shares."""


class SharedVLLMBackend(EngineClient):
    """Compute attention mass with a vLLM engine that also generates: one set of weights for both.

    The whole model runs, so a rerank costs more than in an engine of its own.

    Args:
        model: Folder of the model.
        head_set: The heads to read.
        engine: A running engine, made inside its event loop with
            ``worker_extension_cls=WORKER_EXTENSION``. It is never shut down here. ``None`` starts
            one.
        dtype: For an engine that is started: vLLM's name of the precision; ``auto`` is the
            checkpoint's own.
        engine_args: For an engine that is started: arguments of vLLM's ``AsyncEngineArgs``.

    Raises:
        UnsupportedModelError: This version of vLLM, or the model in it, cannot be read exactly.
        InvalidInputError: The engine cannot be shared, or an engine argument is invalid.
        HeadSetError: The engine runs another model than that of the head set.
        BackendError: The engine did not start.
    """

    def __init__(
        self,
        model: LocalModel,
        head_set: HeadSet,
        *,
        engine: AsyncLLM | None = None,
        dtype: str = "auto",
        engine_args: Mapping[str, Any] | None = None,
    ) -> None:
        check_version()
        if engine is None:
            user_args = {"dtype": dtype, **(engine_args or {})}
            _refuse_data_parallelism(user_args)
            arguments = engine_arguments(model, user_args, worker_extension_cls=WORKER_EXTENSION)
            super().__init__(head_set)
            self._start(arguments)
        else:
            super().__init__(head_set, _loop_of(engine))
            check_engine(engine, model, head_set)
            self._engine = engine
        # The one token that is generated needs room after the prompt.
        self.max_context = self.engine.model_config.max_model_len - 1 - TRAILING_TOKENS
        self._prepare(self._install(head_set))

    def generate(self, prompt: str, parameters: SamplingParams) -> RequestOutput:
        """Return the engine's answer to a prompt, from any thread and also during reranks.

        Args:
            prompt: Text of the prompt.
            parameters: vLLM's parameters of the generation.

        Raises:
            BackendError: The engine has died.
            ClosedError: The engine was closed.
        """
        return self.loop.run(
            _generated(self.engine, TextPrompt(prompt=prompt), parameters, self._next_id())
        )

    async def send(
        self, ids: list[int], options: RequestOptions, read_cache: bool, rank: int
    ) -> npt.NDArray[Any]:
        """See `EngineClient.send`."""
        engine, name = self.engine, self._next_id()
        ids = ids + ids[-1:] * TRAILING_TOKENS
        parameters = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            skip_reading_prefix_cache=not read_cache,
            extra_args={OPTIONS_KEY: list(options._replace(result=name))},
        )
        prompt = TokensPrompt(prompt_token_ids=ids)
        try:
            output = await _generated(engine, prompt, parameters, name, rank)
            self._tokens_run += len(ids) - (output.num_cached_tokens or 0)
        finally:
            # Also if this call is cancelled: its result must not stay in the engine.
            parts = [] if engine.errored else await _fetched(engine, name)
        if not parts or not all(parts):
            return np.zeros(2, dtype=np.float32)  # No rows were seen, so the caller tries again.
        vectors = np.array([np.frombuffer(part, dtype=np.float32) for part in parts])
        vector: npt.NDArray[Any] = vectors.sum(axis=0)
        vector[-1] = vectors[0, -1]
        return vector

    def _release_engine(self) -> None:
        if self.loop.is_own:
            super()._release_engine()
        elif not self.engine.errored:
            removal = self.engine.collective_rpc("core_rerank_remove")
            self.loop.finish(removal, self._check_alive)

    async def _install(self, head_set: HeadSet) -> None:
        heads = head_set.model_dump(mode="json")["heads"]
        problems = await self.engine.collective_rpc("core_rerank_install", args=(heads,))
        for problem in filter(None, problems):
            raise UnsupportedModelError(problem)
        await self._test_probes()


def check_engine(engine: AsyncLLM, model: LocalModel, head_set: HeadSet) -> None:
    """Check that a reranker can share an engine of the caller.

    Raises:
        InvalidInputError: The engine lacks the worker extension, or its parallelism is not
            supported.
        HeadSetError: The engine runs another model.
    """
    parallel = engine.vllm_config.parallel_config
    if parallel.worker_extension_cls != WORKER_EXTENSION:
        raise InvalidInputError(
            "the vLLM engine was made with worker_extension_cls="
            f"{parallel.worker_extension_cls!r}; to share it with a reranker, make it with "
            f"{WORKER_EXTENSION!r}"
        )
    refuse_parallelism(vars(parallel))
    _refuse_data_parallelism(vars(parallel))
    if model_shape(engine.model_config.hf_text_config) != model_shape(model.config()):
        raise HeadSetError(
            f"the vLLM engine runs {engine.model_config.model}, which is not {model.path}, the "
            f"model of the head set {head_set.name!r}"
        )


def serve_arguments(model: LocalModel, dtype: str, more: Sequence[str]) -> list[str]:
    """Return what ``vllm serve`` needs to share its engine with a reranker.

    Args:
        model: Folder of the model.
        dtype: vLLM's name of the precision.
        more: The user's arguments for ``vllm serve``, which may contain some of the server.

    Raises:
        InvalidInputError: The user asks for parallelism that is not supported.
    """
    user_args, _ = parsed_arguments(more)
    refuse_parallelism(user_args)
    _refuse_data_parallelism(user_args)
    # Memory is vLLM's own choice, because the engine is not only for reranking.
    defaults = cuda_arguments(model, {"dtype": dtype, "gpu_memory_utilization": None, **user_args})
    defaults["worker_extension_cls"] = WORKER_EXTENSION
    if dtype != "auto":
        defaults["dtype"] = dtype
    if current_platform.is_cpu():
        defaults["block_size"] = CPU_BLOCK_SIZE
    return [
        part
        for name, value in defaults.items()
        if name not in user_args
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]


def _refuse_data_parallelism(settings: Mapping[str, Any]) -> None:
    if (size := settings.get("data_parallel_size")) not in (None, 1):
        raise InvalidInputError(
            f"data_parallel_size={size!r}: of several engines that also generate, vLLM hands out "
            "the results of the first alone. Start one for each GPU, behind a balancer; an engine "
            "that only reranks, backend='vllm', supports data parallelism"
        )


def _loop_of(engine: AsyncLLM) -> asyncio.AbstractEventLoop:
    handler = engine.output_handler
    if handler is None:
        raise InvalidInputError(
            "the vLLM engine has no event loop yet; make it inside of the running loop that "
            "serves it"
        )
    loop: asyncio.AbstractEventLoop = handler.get_loop()
    return loop


async def _generated(
    engine: AsyncLLM,
    prompt: TextPrompt | TokensPrompt,
    parameters: SamplingParams,
    name: str,
    rank: int | None = None,
) -> RequestOutput:
    async for output in engine.generate(prompt, parameters, name, data_parallel_rank=rank):
        result = output
    return result


async def _fetched(engine: AsyncLLM, name: str) -> list[bytes]:
    """Take a request's result out of the engine; from each tensor parallel rank its part."""
    work = engine.collective_rpc("core_rerank_fetch", args=(name,))
    parts: list[bytes] = await asyncio.shield(asyncio.ensure_future(work))
    return parts
