"""The caller's side of a vLLM engine: prompts in, attention mass out, over vLLM's `AsyncLLM`."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, wait
from typing import Any, NamedTuple, TypeVar

import numpy as np
from cachetools import LRUCache

from core_rerank_integrations.backends.vllm.caller.process import (
    check_main_guard,
    close_at_exit,
    owned_engine,
)
from core_rerank_integrations.backends.vllm.request import (
    COLUMNS_KEY,
    FIRST_ROW_KEY,
    PER_HEAD_KEY,
    SELF_TEST_KEY,
    UNSHARED_KEY,
)
from core_rerank_integrations.errors import (
    BackendError,
    ClosedError,
    InvalidInputError,
    UnsupportedModelError,
    requires_extra,
)
from core_rerank_integrations.method.prompt import Prompt, TokenIds
from core_rerank_integrations.method.scoring import Mass

with requires_extra("vllm"):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.inputs import TokensPrompt
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.exceptions import EngineDeadError

log = logging.getLogger(__name__)

LIVENESS_SECONDS = 1.0
"""How often a waiting call looks whether the engine still lives."""
CANCEL_SECONDS = 5.0
SHUTDOWN_SECONDS = 30.0
"""How long an engine may take to end before it is killed; a busy machine needs a few."""
SELF_TEST_TOKENS = 43
"""More than a block of the cache, and no whole number of blocks."""
SELF_TESTS = 20
"""How often a busy engine may split the tiny prompt over steps, in which it tells nothing."""
ENGINE_DIED = (
    "the vLLM engine has died; its own log above says why. Start it anew with "
    "reranker.restart(), or make a new reranker"
)
RESULT_CACHE_TOKENS = 4_000_000
"""Prompt tokens whose attention mass is kept, at four bytes each: a repeated question is free."""

T = TypeVar("T")


class EngineClient(ABC):
    """Brings calls from any thread to one engine on one event loop, and checks its answers.

    Args:
        loop: The loop that the engine runs on; ``None`` makes one, in a thread of its own.
        heads: Number of heads that are read.
    """

    max_context: int

    def __init__(self, heads: int, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._heads = heads
        self._ids = itertools.count()
        self._masses: LRUCache[bytes, Mass] = LRUCache(RESULT_CACHE_TOKENS, getsizeof=np.size)
        self._openings: LRUCache[tuple[bytes, bool], Mass] = LRUCache(
            RESULT_CACHE_TOKENS, getsizeof=np.size
        )
        self._closed = False
        self._calls: set[asyncio.Task[Any]] = set()
        self._engine: AsyncLLM | None = None
        self._thread: threading.Thread | None = None
        if loop is None:
            loop = asyncio.new_event_loop()
            self._thread = threading.Thread(
                target=loop.run_forever, name="core-rerank-vllm", daemon=True
            )
            self._thread.start()
        self._loop = loop

    def attention_mass(self, prompts: Sequence[Prompt]) -> list[Mass]:
        """See `AttentionBackend.attention_mass`."""
        return self._wait_for(self._weighed_means(prompts))

    def head_mass(self, prompts: Sequence[Prompt]) -> list[Mass]:
        """See `AttentionBackend.head_mass`."""
        return self._wait_for(self._means_of_rows(prompts, per_head=True))

    def cache_documents(self, prompts: Sequence[Prompt]) -> int:
        """See `AttentionBackend.remember`; the engine's own prefix cache is what keeps them."""
        self.attention_mass(prompts)
        return 0

    def forget(self) -> None:
        """See `AttentionBackend.forget`; the engine's own prefix cache stays."""
        self._wait_for(self._forget())

    def close(self) -> None:
        """Stop what was started. Waiting calls end with an error."""
        if not self._closed:
            self._closed = True
            ending = asyncio.run_coroutine_threadsafe(self._cancel_calls(), self._loop)
            if not running_on(self._loop):
                ending.result()
            try:
                self._release_engine()
            finally:
                self._engine = None
                self._stop_loop()

    @abstractmethod
    def _release_engine(self) -> None:
        """Let go of the engine."""

    @abstractmethod
    async def _ask(
        self, engine: AsyncLLM, tokens: TokensPrompt, options: Mapping[str, Any], read_cache: bool
    ) -> np.ndarray[Any, Any]:
        """One request: `AttentionSum.vector`, summed over tensor parallel ranks."""

    def _start(self, arguments: dict[str, Any]) -> None:
        """Start an engine on the loop of this client's own."""
        log.info("Starting vLLM with %s ...", arguments["model"])
        try:
            check_main_guard()
            with owned_engine():
                self._engine = self._wait_for(_started(arguments))
            close_at_exit(self)
        except BaseException:
            self._closed = True
            self._stop_loop()
            raise

    async def _test_probes(self) -> None:
        """Compare the probes with the engine's own attention on a tiny prompt, or refuse it."""
        assert self._engine is not None
        config = self._engine.model_config
        vocabulary = config.hf_text_config.vocab_size
        tokens = [7919 * position % vocabulary for position in range(1, SELF_TEST_TOKENS + 1)]
        options = {FIRST_ROW_KEY: 0, COLUMNS_KEY: 1, UNSHARED_KEY: 0, SELF_TEST_KEY: True}
        for _ in range(SELF_TESTS):
            error, rows = await self._ask(
                self._engine, TokensPrompt(prompt_token_ids=tokens), options, read_cache=False
            )
            if rows:
                break
        else:
            raise BackendError(
                f"the vLLM engine split a prompt of {SELF_TEST_TOKENS} tokens over several steps, "
                f"{SELF_TESTS} times, so its attention could not be tested; raise "
                "max_num_batched_tokens, or try again when it is less busy"
            )
        if not error <= tolerance(str(config.dtype)):
            raise UnsupportedModelError(
                f"attention read from vLLM running {config.model} differs from its own by "
                f"{error:.2g}; it computes attention in a way that this package does not know"
            )
        log.info("vLLM is ready: its probes agree with its own attention")

    def _wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        if self._closed:
            work.close()
            raise ClosedError("the vLLM engine of this reranker is closed")
        if running_on(self._loop):
            work.close()
            raise InvalidInputError(
                "this call would block the event loop that the vLLM engine runs on; use "
                "`await reranker.arerank(...)` there"
            )
        future = asyncio.run_coroutine_threadsafe(self._tracked(work), self._loop)
        try:
            # vLLM does not wake every waiting request when its process is killed.
            while not wait([future], timeout=LIVENESS_SECONDS).done:
                engine = self._engine  # None while it starts, and once closed.
                if engine is not None and engine.errored:
                    raise BackendError(ENGINE_DIED)
            return future.result()
        except CancelledError as error:
            raise ClosedError("the vLLM engine was closed while a call was waiting") from error
        except BaseException:
            future.cancel()  # An interrupted call aborts its requests.
            raise

    async def _tracked(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.current_task()
        assert task is not None
        self._calls.add(task)
        try:
            return await work
        finally:
            self._calls.discard(task)

    async def _forget(self) -> None:
        self._masses.clear()
        self._openings.clear()

    async def _cancel_calls(self) -> None:
        """Cancel what waits, while the engine can still be told that nobody does."""
        for call in self._calls:
            call.cancel()
        if self._calls:
            await asyncio.wait(self._calls, timeout=CANCEL_SECONDS)

    def _shut_down(self) -> None:
        """End an engine on this client's own loop."""
        # What listens to it first: it would report the engine's end as a failure.
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result()
        if self._engine is not None:
            self._engine.shutdown(timeout=SHUTDOWN_SECONDS)

    def _stop_loop(self) -> None:
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _weighed_means(self, prompts: Sequence[Prompt]) -> list[Mass]:
        """Mean over all query rows, weighed, [prefix tokens + 1]; kept ones are not asked."""
        asked = [
            len(prompt.prefix).to_bytes(4) + prompt.prefix.tobytes() + prompt.suffix.tobytes()
            for prompt in prompts
        ]
        known = {key: self._masses[key] for key in asked if key in self._masses}
        new = {key: prompt for key, prompt in zip(asked, prompts, strict=True) if key not in known}
        means = await self._means_of_rows(list(new.values()), per_head=False)
        for key, (mass,) in zip(new, means, strict=True):
            known[key] = mass
            _keep(self._masses, key, mass)
        return [known[key] for key in asked]

    async def _means_of_rows(self, prompts: Sequence[Prompt], per_head: bool) -> list[Mass]:
        """Mean over all query rows, shape [heads or 1, prefix tokens + 1].

        Of a prompt of one document, which may well come again with another question, the rows
        before the query are asked for once, and what the engine has read reaches to the query.
        """
        requests = [_Request.of(prompt) for prompt in prompts]
        shared = {opening.key: opening for opening, _ in requests if opening}
        before = {
            key: mass for key in shared if (mass := self._openings.get((key, per_head))) is not None
        }
        new = [opening for key, opening in shared.items() if key not in before]
        # Openings first: what a step computes for one request, a later one of it has already.
        work = [*new, *(question for _, question in requests)]
        sums = await self._together(self._whole_sum(request, per_head) for request in work)
        for opening, mass in zip(new, sums, strict=False):
            before[opening.key] = mass
            _keep(self._openings, (opening.key, per_head), mass)
        means = []
        for prompt, (of, _), mass in zip(prompts, requests, sums[len(new) :], strict=True):
            rows = np.float32(len(prompt.suffix))
            means.append((mass if of is None else mass + before[of.key]) / rows)
        return means

    async def _together(self, work: Iterable[Coroutine[Any, Any, Mass]]) -> list[Mass]:
        return await asyncio.gather(*work)

    async def _whole_sum(self, request: _Request, per_head: bool) -> Mass:
        """Sum over all rows of a request, shape [heads or 1, columns]."""
        rows = 0
        for read_cache in (True, False):
            # A second time if rows came from the prefix cache, or from a graph that no probe sees
            # into: their queries were never computed, or not seen.
            summed, rows = await self._sum_of_rows(request, per_head, read_cache)
            if rows == request.rows:
                return summed
        raise BackendError(
            f"vLLM computed {rows} of {request.rows} query tokens of a prompt of "
            f"{len(request.tokens)}; a score from these would be wrong"
        )

    async def _sum_of_rows(
        self, request: _Request, per_head: bool, read_cache: bool
    ) -> tuple[Mass, int]:
        if self._engine is None:
            raise ClosedError("the vLLM engine of this reranker is closed")
        options = {
            FIRST_ROW_KEY: len(request.tokens) - request.rows,
            COLUMNS_KEY: request.columns,
            UNSHARED_KEY: request.unshared,
            PER_HEAD_KEY: per_head,
        }
        tokens = TokensPrompt(prompt_token_ids=request.tokens.tolist())
        try:
            vector = await self._ask(self._engine, tokens, options, read_cache)
        except EngineDeadError as error:
            raise BackendError(ENGINE_DIED) from error
        return vector[:-1].reshape(self._heads if per_head else 1, -1), int(vector[-1])

    def _next_id(self) -> str:
        return f"core-{next(self._ids)}"


class _Request(NamedTuple):
    """What an engine is asked about: the attention of the last rows on the first columns."""

    tokens: TokenIds
    rows: int
    columns: int
    unshared: int
    """From which token on nothing is left in the cache for other requests."""

    @classmethod
    def of(cls, prompt: Prompt) -> tuple[_Request | None, _Request]:
        """What a prompt takes: its opening, if it may serve other questions, and the rest."""
        tokens = np.concatenate((prompt.prefix, prompt.suffix))
        start, rows = len(prompt.prefix), len(prompt.suffix)
        if len(prompt.document_spans) > 1 or not prompt.instruction:
            return None, cls(tokens, rows, start + 1, start)
        border = start + prompt.instruction
        return (
            cls(tokens[:border], prompt.instruction, start + 1, border),
            cls(tokens, rows - prompt.instruction, start + 1, border),
        )

    @property
    def key(self) -> bytes:
        """Tells openings apart."""
        return self.rows.to_bytes(4) + self.tokens.tobytes()


def _keep(cache: LRUCache[Any, Mass], key: Any, mass: Mass) -> None:
    if mass.size <= cache.maxsize:
        cache[key] = mass


def tolerance(dtype: str) -> float:
    """Largest relative error of a probe that rounding explains.

    Kernels on CUDA multiply float32 matrices in TF32, whose mantissa has ten bits.
    """
    if "float32" not in dtype:
        return 5e-2
    return 1e-2 if current_platform.is_cuda() else 1e-3


def running_on(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether the caller runs on this loop, and so would block it by waiting for it."""
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def _started(arguments: dict[str, Any]) -> AsyncLLM:
    # AsyncLLM binds itself to the running loop, so it is made inside of it.
    try:
        # The context decides how many tokens a step may take; that of a library is generous.
        return AsyncLLM.from_engine_args(
            AsyncEngineArgs(**arguments), usage_context=UsageContext.LLM_CLASS
        )
    except (RuntimeError, ValueError) as error:
        chosen = arguments.get("attention_backend")
        told = f" with attention_backend={chosen!r}" if chosen else ""
        raise BackendError(f"vLLM could not start{told}: {error}") from error
