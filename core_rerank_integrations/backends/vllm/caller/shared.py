"""An engine that generates answers, and reranks with the same weights."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy as np

from core_rerank_integrations.backends.vllm.caller.client import EngineClient, running_on
from core_rerank_integrations.backends.vllm.request import RESULT_KEY, TRAILING_TOKENS
from core_rerank_integrations.errors import (
    HeadSetError,
    InvalidInputError,
    UnsupportedModelError,
    requires_extra,
)
from core_rerank_integrations.heads.head_set import HeadSet
from core_rerank_integrations.method.scoring import Mass
from core_rerank_integrations.models.resolve import LocalModel, model_shape

with requires_extra("vllm"):
    from vllm import RequestOutput, SamplingParams
    from vllm.inputs import TextPrompt, TokensPrompt
    from vllm.v1.engine.async_llm import AsyncLLM

    from core_rerank_integrations.backends.vllm.caller.arguments import (
        REFUSED_PARALLELISM,
        cuda_arguments,
        engine_arguments,
        refuse_parallelism,
    )
    from core_rerank_integrations.backends.vllm.compat import check_version

WORKER_EXTENSION = "core_rerank_integrations.backends.vllm.worker.CoReWorkerExtension"
"""What an engine must be made with, as ``worker_extension_cls``, for a reranker to share it."""


class SharedVLLMBackend(EngineClient):
    """CoRe attention mass from an engine that also generates: one set of weights for both.

    The whole model runs, so a rerank costs more than in an engine of its own.

    Args:
        model: The model's folder.
        head_set: The heads to read.
        engine: A running engine of the caller's, made inside its event loop and with
            ``worker_extension_cls=WORKER_EXTENSION``; it stays the caller's to shut down.
            ``None`` starts one.
        dtype: For an engine that is started: as vLLM names it; ``auto`` is the checkpoint's own.
        engine_args: For an engine that is started: any of vLLM's `AsyncEngineArgs`.

    Raises:
        UnsupportedModelError: This vLLM, or what it runs, cannot be read exactly.
        InvalidInputError: The engine cannot be shared, or an engine argument has no meaning.
        HeadSetError: The engine runs another model than the head set was found on.
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
            given = engine_args or {}
            arguments = engine_arguments(
                given,
                own={"dtype": dtype, **cuda_arguments(model, dtype, given)},
                fixed={"model": str(model.path), "worker_extension_cls": WORKER_EXTENSION},
            )
            super().__init__(len(head_set.heads))
            self._start(arguments)
        else:
            super().__init__(len(head_set.heads), _loop_of(engine))
            _check_engine(engine, model, head_set)
            self._engine = engine
        assert self._engine is not None
        # One token is generated, which must have room after the prompt.
        self.max_context = self._engine.model_config.max_model_len - 1 - TRAILING_TOKENS
        self._installed = asyncio.run_coroutine_threadsafe(self._install(head_set), self._loop)
        if running_on(self._loop):
            return  # Waiting here would block the engine's loop: the first call waits instead.
        try:
            self._installed.result()
        except BaseException:
            self.close()
            raise

    def generate(self, prompt: str, parameters: SamplingParams) -> RequestOutput:
        """Let the engine answer a prompt, from any thread; reranks may be under way.

        Raises:
            BackendError: The engine has died.
        """
        return self._wait_for(
            self._generate(TextPrompt(prompt=prompt), parameters, self._next_id())
        )

    def _release_engine(self) -> None:
        if self._thread is not None:
            self._shut_down()
        elif self._engine is not None and not self._engine.errored:
            removal = asyncio.run_coroutine_threadsafe(
                self._engine.collective_rpc("core_rerank_remove"), self._loop
            )
            if not running_on(self._loop):
                removal.result()

    async def _install(self, head_set: HeadSet) -> None:
        assert self._engine is not None
        heads = [(head.layer, head.head, head.weight) for head in head_set.heads]
        problems = await self._engine.collective_rpc("core_rerank_install", args=(heads,))
        for problem in filter(None, problems):
            raise UnsupportedModelError(problem)
        await self._test_probes()

    async def _together(self, work: Any) -> list[Mass]:
        await asyncio.wrap_future(self._installed)
        return await super()._together(work)

    async def _ask(
        self, engine: AsyncLLM, tokens: TokensPrompt, options: Mapping[str, Any], read_cache: bool
    ) -> np.ndarray[Any, Any]:
        name = self._next_id()
        ids = tokens["prompt_token_ids"]
        tokens = TokensPrompt(prompt_token_ids=ids + ids[-1:] * TRAILING_TOKENS)
        parameters = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            skip_reading_prefix_cache=not read_cache,
            extra_args={**options, RESULT_KEY: name},
        )
        try:
            await self._generate(tokens, parameters, name)
        finally:
            # Also when this call is cancelled: what it asked for must not stay behind.
            parts = [] if engine.errored else await self._fetch(engine, name)
        if not parts or not all(parts):
            return np.zeros(self._heads + 1, dtype=np.float32)  # No rows: asked again.
        vectors = np.array([np.frombuffer(part, dtype=np.float32) for part in parts])
        summed: np.ndarray[Any, Any] = vectors.sum(axis=0)
        summed[-1] = vectors[0, -1]
        return summed

    async def _fetch(self, engine: AsyncLLM, name: str) -> list[bytes]:
        fetched = engine.collective_rpc("core_rerank_fetch", args=(name,))
        parts: list[bytes] = await asyncio.shield(asyncio.ensure_future(fetched))
        return parts

    async def _generate(
        self, prompt: TextPrompt | TokensPrompt, parameters: SamplingParams, name: str
    ) -> RequestOutput:
        assert self._engine is not None
        async for output in self._engine.generate(prompt, parameters, name):
            result = output
        return result


def _loop_of(engine: AsyncLLM) -> asyncio.AbstractEventLoop:
    handler = engine.output_handler
    if handler is None:
        raise InvalidInputError(
            "the vLLM engine has no event loop yet; make it inside of the running loop that "
            "serves it"
        )
    loop: asyncio.AbstractEventLoop = handler.get_loop()
    return loop


def _check_engine(engine: AsyncLLM, model: LocalModel, head_set: HeadSet) -> None:
    extension = engine.vllm_config.parallel_config.worker_extension_cls
    if extension != WORKER_EXTENSION:
        raise InvalidInputError(
            f"the vLLM engine was made with worker_extension_cls={extension!r}; to share it with "
            f"a reranker, make it with {WORKER_EXTENSION!r}"
        )
    for name in REFUSED_PARALLELISM:
        refuse_parallelism(name, getattr(engine.vllm_config.parallel_config, name, 1))
    running = model_shape(engine.model_config.hf_text_config)
    if running != model_shape(model.config()):
        raise HeadSetError(
            f"the vLLM engine runs {engine.model_config.model}, which is not {model.path}, the "
            f"model of the head set {head_set.name!r}"
        )
