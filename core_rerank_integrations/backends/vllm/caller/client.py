"""Prompts as requests to a vLLM engine, and its answers as attention mass."""

from __future__ import annotations

import asyncio
import itertools
import logging
import zlib
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import numpy.typing as npt
from cachetools import LRUCache

from core_rerank_integrations.backends.base import BackendStats, GroupMass, PromptGroup
from core_rerank_integrations.backends.vllm.caller.loop import EngineLoop
from core_rerank_integrations.backends.vllm.caller.process import (
    check_main_guard,
    close_at_exit,
    owned_engine,
)
from core_rerank_integrations.backends.vllm.request import RequestOptions
from core_rerank_integrations.errors import (
    BackendError,
    ClosedError,
    UnsupportedModelError,
    requires_extra,
)
from core_rerank_integrations.heads.head_set import HeadSet
from core_rerank_integrations.method.prompt import SharedPrefix, TokenIds
from core_rerank_integrations.method.scoring import Mass

with requires_extra("vllm"):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.exceptions import EngineDeadError

log = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 30.0
"""Time limit for an engine to end before it is killed; a busy machine needs a few seconds."""
SELF_TEST_TOKENS = 43
"""More than a block of the cache, and not a whole number of blocks."""
SELF_TESTS = 20
"""Attempts of the self-test, which needs its prompt in a single step of the engine."""
ENGINE_DIED = (
    "the vLLM engine has died; its own log above says why. Start it anew with "
    "reranker.restart(), or make a new reranker"
)
MASS_CACHE_BYTES = 1 << 26
"""Size limit of the cached attention mass; a repeated question is free."""


RequestKey = tuple[bytes, bytes, bool]
"""Key of the prefix, the question (empty for the rows of the instruction), and ``per_head``."""


class EngineClient(ABC):
    """Compute attention mass with a vLLM engine, for callers in any thread.

    Args:
        head_set: The heads to read.
        loop: The event loop of the caller's engine; ``None`` starts one.
        engines: Number of data parallel engines, each with a cache of its own.
    """

    max_context: int

    def __init__(
        self,
        head_set: HeadSet,
        loop: asyncio.AbstractEventLoop | None = None,
        engines: int = 1,
    ) -> None:
        self.loop = EngineLoop(loop, self._check_alive)
        self._engine: AsyncLLM | None = None
        self._preparation: Future[None] | None = None
        self._engines = engines
        self._weights = head_set.weights[None]
        self._ids = itertools.count()
        self._tokens_run = 0
        self._sums: LRUCache[RequestKey, Mass] = LRUCache(
            MASS_CACHE_BYTES, getsizeof=lambda mass: mass.nbytes
        )

    @property
    def engine(self) -> AsyncLLM:
        """The running engine.

        Raises:
            ClosedError: It was closed.
        """
        if self._engine is None:
            raise ClosedError("the vLLM engine of this reranker is closed")
        return self._engine

    @property
    def is_alive(self) -> bool:
        """See `AttentionBackend.is_alive`."""
        engine = self._engine  # Another thread may close it meanwhile.
        return engine is not None and not engine.errored

    @property
    def dtype(self) -> object:
        """See `AttentionBackend.dtype`."""
        return self.engine.model_config.dtype

    @property
    def identity(self) -> str:
        """See `AttentionBackend.identity`. Nothing but the dtype rounds."""
        return str(self.dtype)

    @property
    def stats(self) -> BackendStats:
        """See `AttentionBackend.stats`. The engine's own cache is not counted."""
        prefixes = {prefix for prefix, _, _ in list(self._sums)}  # Calls change the cache.
        return BackendStats(self._tokens_run, len(prefixes), int(self._sums.currsize))

    def attention_mass(
        self, groups: Sequence[PromptGroup], weights: Mass | None = None
    ) -> list[GroupMass]:
        """See `AttentionBackend.attention_mass`."""
        # The engine sums with the head set's own weights; others need the mass of each head.
        per_head = weights is None or not np.array_equal(weights, self._weights)
        results = self.loop.run(self.group_masses(groups, per_head))
        if weights is None or not per_head:
            return results
        return [
            GroupMass(weights @ baseline, [weights @ mass for mass in questions])
            for baseline, questions in results
        ]

    def cache_prefixes(self, prefixes: Sequence[SharedPrefix]) -> int:
        """See `AttentionBackend.cache_prefixes`. The engine's own cache holds keys and values."""
        self.attention_mass([PromptGroup(prefix, ()) for prefix in prefixes], self._weights)
        return 0

    def clear_cache(self) -> None:
        """See `AttentionBackend.clear_cache`. The engine's own cache stays."""

        async def clear() -> None:  # On the loop, where calls use the cache.
            self._sums.clear()

        self.loop.run(clear())

    def close(self) -> None:
        """Stop what was started. Waiting calls end with an error."""
        if not self.loop.is_closed:
            # Calls and listeners end while the engine lives: it can still receive aborts, and no
            # listener reports its end as a failure.
            self.loop.close()
            try:
                self._release_engine()
            finally:
                self._engine = None
                self.loop.stop()

    async def group_masses(self, groups: Sequence[PromptGroup], per_head: bool) -> list[GroupMass]:
        """Compute the mass of each head, or their weighted sum; runs on the engine's loop."""
        if self._preparation is not None:
            # Shielded, because a cancelled caller must not cancel it for the others.
            await asyncio.shield(asyncio.wrap_future(self._preparation))
        requests = _requests(groups, per_head)
        sums = {key: self._sums[key] for key in requests if key in self._sums}
        missing = {key: request for key, request in requests.items() if key not in sums}
        computed = await asyncio.gather(*(self._row_sum(*request) for request in missing.values()))
        for key, mass in zip(missing, computed, strict=True):
            sums[key] = mass
            if mass.nbytes <= self._sums.maxsize:
                self._sums[key] = mass
        results = []
        for prefix, questions in groups:
            instruction = sums.get((prefix.key, b"", per_head), np.float32(0))
            baseline, *masses = (
                (instruction + sums[prefix.key, question.tobytes(), per_head])
                / np.float32(prefix.instruction_length + len(question))
                for question in (prefix.baseline, *questions)
            )
            results.append(GroupMass(baseline, masses))
        return results

    @abstractmethod
    async def send(
        self, ids: list[int], options: RequestOptions, read_cache: bool, rank: int
    ) -> npt.NDArray[Any]:
        """Send one request to the engine.

        Args:
            ids: Token ids of the prompt.
            options: What the request asks for.
            read_cache: Whether the engine may use its prefix cache.
            rank: Which of the data parallel engines gets the request.

        Returns:
            `AttentionSum.vector`, summed over tensor parallel ranks.
        """

    def _start(self, arguments: dict[str, Any]) -> None:
        """Start an engine on this client's own loop."""
        log.info("Starting vLLM with %s ...", arguments["model"])
        try:
            check_main_guard()
            with owned_engine():
                self.loop.run(self._start_engine(arguments))
            close_at_exit(self)
        except BaseException:
            self.close()  # Also of an engine whose start was interrupted, when it has started.
            raise

    async def _start_engine(self, arguments: dict[str, Any]) -> None:
        # AsyncLLM binds itself to the running loop, so it is made in a coroutine.
        try:
            # The usage context decides how many tokens a step may take; a library's is generous.
            self._engine = AsyncLLM.from_engine_args(
                AsyncEngineArgs(**arguments), usage_context=UsageContext.LLM_CLASS
            )
        except (RuntimeError, ValueError) as error:
            backend = arguments.get("attention_backend")
            detail = f" with attention_backend={backend!r}" if backend else ""
            raise BackendError(f"vLLM could not start{detail}: {error}") from error

    def _prepare(self, work: Coroutine[Any, Any, None]) -> None:
        """Run what must end before the first request.

        On the engine's loop, waiting here would block it, so the first call waits instead.
        """
        if self.loop.is_current:
            self._preparation = asyncio.run_coroutine_threadsafe(work, self.loop.asyncio_loop)
            return
        try:
            self.loop.run(work)
        except BaseException:
            self.close()
            raise

    async def _test_probes(self) -> None:
        """Compare the probes with the engine's own attention on a tiny prompt, in each engine."""
        await asyncio.gather(*map(self._test_probes_of, range(self._engines)))

    async def _test_probes_of(self, rank: int) -> None:
        """Compare the probes of one engine.

        Raises:
            UnsupportedModelError: They differ.
            BackendError: The engine split the prompt every time.
        """
        config = self.engine.model_config
        vocabulary = config.hf_text_config.vocab_size
        ids = [7919 * position % vocabulary for position in range(1, SELF_TEST_TOKENS + 1)]
        options = RequestOptions(first_row=0, columns=1, unshared=0, is_self_test=True)
        for _ in range(SELF_TESTS):
            error, rows = await self.send(ids, options, read_cache=False, rank=rank)
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

    async def _row_sum(self, ids: TokenIds, options: RequestOptions) -> Mass:
        """Return the attention of a prompt's query rows, summed over them, [heads or 1, tokens].

        Raises:
            BackendError: The engine has died, or did not compute all rows.
        """
        rows = 0
        # A question and what was read of its documents meet in one engine.
        rank = zlib.crc32(ids[: options.unshared].tobytes()) % self._engines
        # Rows that came from the prefix cache have no queries, and those in a captured graph were
        # not seen. The second attempt does not read the cache.
        for read_cache in (True, False):
            try:
                vector = await self.send(ids.tolist(), options, read_cache, rank)
            except EngineDeadError as error:
                raise BackendError(ENGINE_DIED) from error
            rows = int(vector[-1])
            if rows == len(ids) - options.first_row:
                return vector[:-1].reshape(-1, options.columns)
        raise BackendError(
            f"vLLM computed {rows} of {len(ids) - options.first_row} query tokens of a prompt of "
            f"{len(ids)}; a score from these would be wrong"
        )

    def _check_alive(self) -> None:
        """Check the engine: when it dies, vLLM does not wake each of its requests.

        Raises:
            BackendError: It has died.
        """
        engine = self._engine  # Another thread may close it meanwhile.
        if engine is not None and engine.errored:
            raise BackendError(ENGINE_DIED)

    def _next_id(self) -> str:
        return f"core-{next(self._ids)}"

    def _release_engine(self) -> None:
        """Shut down the engine, or give it back to the caller."""
        if self._engine is not None:
            self._engine.shutdown(timeout=SHUTDOWN_SECONDS)


def tolerance(dtype: str) -> float:
    """Return the largest relative error of a probe that rounding explains.

    Kernels on CUDA multiply float32 matrices in TF32, whose mantissa has ten bits.
    """
    if "float32" not in dtype:
        return 5e-2
    return 1e-2 if current_platform.is_cuda() else 1e-3


def _requests(
    groups: Sequence[PromptGroup], per_head: bool
) -> dict[RequestKey, tuple[TokenIds, RequestOptions]]:
    """Return the requests of prompts, those of instructions first.

    A document by itself is likely to be ranked again for another question. The rows of its
    instruction are then requested separately, so that the engine's cache reaches up to the query.
    With several documents in a prompt, the whole query span is one request.
    """
    # What a step computes for one request, later requests of the step find in the cache.
    instructions: dict[RequestKey, tuple[TokenIds, RequestOptions]] = {}
    questions: dict[RequestKey, tuple[TokenIds, RequestOptions]] = {}
    for prefix, group_questions in groups:
        start, shared = prefix.context_length, prefix.context_length
        if len(prefix.document_spans) == 1 and prefix.instruction_length:
            shared = len(prefix.ids)
            options = RequestOptions(start, start + 1, shared, per_head)
            instructions[prefix.key, b"", per_head] = prefix.ids, options
        for question in (prefix.baseline, *group_questions):
            ids = np.concatenate((prefix.ids, question))
            options = RequestOptions(shared, start + 1, shared, per_head)
            questions[prefix.key, question.tobytes(), per_head] = ids, options
    return instructions | questions
