"""The caller's side of the vLLM backend: prompts in, attention mass out, over vLLM's `AsyncLLM`."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError, wait
from typing import Any, TypeVar

import numpy as np
from cachetools import LRUCache

from core_rerank_integrations.backends.vllm.request import HEADS_KEY, QUERY_START_KEY
from core_rerank_integrations.errors import (
    BackendError,
    ClosedError,
    InvalidInputError,
    requires_extra,
)
from core_rerank_integrations.heads import HeadSet
from core_rerank_integrations.models import LocalModel, first_layers
from core_rerank_integrations.prompt import Prompt
from core_rerank_integrations.scoring import Mass

with requires_extra("vllm"):
    from vllm import PoolingParams
    from vllm.config import PoolerConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.inputs import TokensPrompt
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.exceptions import EngineDeadError

    from core_rerank_integrations.backends.vllm.compat import check_version
    from core_rerank_integrations.backends.vllm.plugin import ARCHITECTURE_PREFIX
    from core_rerank_integrations.backends.vllm.pooler import TASK

TOKENS_PER_DOCUMENT = 512
"""Room planned for a document of the head set's window, where no ``max_model_len`` is given."""
DEFAULT_WINDOW = 32
GPU_MEMORY_SHARE = 0.5
CPU_BLOCK_SIZE = 32
"""vLLM's own on CPU is 128, in which a short document never fills a block that could be shared."""
LIVENESS_SECONDS = 1.0
"""How often a waiting call looks whether the engine still lives."""
ENGINE_DIED = "the vLLM engine has died; its own log above says why. Make a new reranker"
RESULT_CACHE_TOKENS = 4_000_000
"""Prompt tokens whose attention mass is kept, at four bytes each: a repeated question is free."""

REFUSED_PARALLELISM = {
    "pipeline_parallel_size": "pipeline parallelism",
    "decode_context_parallel_size": "context parallelism",
    "prefill_context_parallel_size": "context parallelism",
}

T = TypeVar("T")


class VLLMBackend:
    """CoRe attention mass from a vLLM engine of its own, cut above the highest head.

    Prompts of all calls, from any thread, reach the same continuous batching; prompts that
    share a prefix share it through vLLM's prefix cache, the ``N/A`` twin first of all.

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
        arguments = _engine_arguments(model, head_set, dtype, engine_args or {})
        self.max_context: int = arguments["max_model_len"]
        self._ids = itertools.count()
        self._masses: LRUCache[bytes, Mass] = LRUCache(RESULT_CACHE_TOKENS, getsizeof=len)
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="core-rerank-vllm", daemon=True
        )
        self._thread.start()
        try:
            self._engine: AsyncLLM = self._run(_start(arguments))
        except BaseException:
            self._stop_loop()
            raise

    def attention_mass(self, prompts: Sequence[Prompt]) -> list[Mass]:
        """See `AttentionBackend.attention_mass`."""
        return self._run(self._all(prompts))

    def close(self) -> None:
        """Stop the engine and its processes. Waiting calls end with an error."""
        if not self._closed:
            self._closed = True
            # Before the engine goes: what listens to it would report its end as a failure.
            self._cancel_all()
            self._engine.shutdown()
            del self._engine
            self._stop_loop()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._closed:
            work.close()
            raise ClosedError("the vLLM engine of this reranker is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            # vLLM does not wake every waiting request when its process is killed.
            while not wait([future], timeout=LIVENESS_SECONDS).done:
                engine = getattr(self, "_engine", None)  # None while it starts, and once closed.
                if engine is not None and engine.errored:
                    raise BackendError(ENGINE_DIED)
            return future.result()
        except CancelledError as error:
            raise ClosedError("the vLLM engine was closed while a call was waiting") from error
        except BaseException:
            future.cancel()  # An interrupted call aborts its requests.
            raise

    def _cancel_all(self) -> None:
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _all(self, prompts: Sequence[Prompt]) -> list[Mass]:
        return list(await asyncio.gather(*map(self._mass, prompts)))

    async def _mass(self, prompt: Prompt) -> Mass:
        key = len(prompt.prefix).to_bytes(4) + prompt.prefix.tobytes() + prompt.suffix.tobytes()
        if (known := self._masses.get(key)) is not None:
            return known
        summed, rows = await self._encode(prompt, read_cache=True)
        if rows != len(prompt.suffix):
            # Query tokens came from the prefix cache, so their queries were never computed.
            summed, rows = await self._encode(prompt, read_cache=False)
        if rows != len(prompt.suffix):
            raise BackendError(
                f"vLLM computed {rows} of {len(prompt.suffix)} query tokens of a prompt of "
                f"{len(prompt)}; a score from these would be wrong"
            )
        mass: Mass = summed / np.float32(rows)
        if len(mass) <= self._masses.maxsize:
            self._masses[key] = mass
        return mass

    async def _encode(self, prompt: Prompt, read_cache: bool) -> tuple[Mass, int]:
        parameters = PoolingParams(
            task=TASK,
            skip_reading_prefix_cache=not read_cache,
            extra_kwargs={QUERY_START_KEY: len(prompt.prefix)},
        )
        tokens = TokensPrompt(prompt_token_ids=[*prompt.prefix.tolist(), *prompt.suffix.tolist()])
        try:
            async for output in self._engine.encode(tokens, parameters, f"core-{next(self._ids)}"):
                result = output
        except EngineDeadError as error:
            raise BackendError(ENGINE_DIED) from error
        vector = result.outputs.data.numpy()
        return vector[:-1], int(vector[-1])


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def _start(arguments: dict[str, Any]) -> AsyncLLM:
    # AsyncLLM binds itself to the running loop, so it is made inside of ours.
    try:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    except (RuntimeError, ValueError) as error:
        raise BackendError(f"vLLM could not start: {error}") from error


def _engine_arguments(
    model: LocalModel, head_set: HeadSet, dtype: str, given: Mapping[str, Any]
) -> dict[str, Any]:
    for name, meaning in REFUSED_PARALLELISM.items():
        if given.get(name, 1) != 1:
            raise InvalidInputError(
                f"{name}={given[name]!r}: reranking does not support {meaning}; use "
                "tensor_parallel_size"
            )
    if "fp8" in str(given.get("kv_cache_dtype", "auto")):
        raise InvalidInputError(
            f"kv_cache_dtype={given['kv_cache_dtype']!r}: reranking reads keys in full precision; "
            "leave it at 'auto'"
        )
    if unknown := set(given) - set(AsyncEngineArgs.__dataclass_fields__):
        raise InvalidInputError(f"vLLM has no engine argument {', '.join(sorted(unknown))}")
    config = model.config()
    overrides = {
        **first_layers(config, head_set.highest_layer + 1),
        "architectures": [ARCHITECTURE_PREFIX + config.architectures[0]],
        HEADS_KEY: [[head.layer, head.head, head.weight] for head in head_set.heads],
    }
    room = (head_set.window or DEFAULT_WINDOW) * TOKENS_PER_DOCUMENT
    return {
        "model": str(model.path),
        "dtype": dtype,
        "max_model_len": min(config.max_position_embeddings, room),
        "gpu_memory_utilization": GPU_MEMORY_SHARE,
        "enable_prefix_caching": True,
        "block_size": CPU_BLOCK_SIZE if current_platform.is_cpu() else None,
        "disable_log_stats": True,
        **given,
        "runner": "pooling",
        "pooler_config": PoolerConfig(task=TASK),
        "hf_overrides": {**given.get("hf_overrides", {}), **overrides},
    }
