"""One queue in front of the model, in which the requests of all clients meet.

Requests that are there at the same time are read together. They take turns: a short list is read
whole, a long one in parts, each after the turns of the others. In prompts of one document a score
does not depend on other documents, so the parts make up the list. Where prompts hold several
documents, every list is read whole.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from core_rerank_integrations._internal.cancellation import run_in_thread
from core_rerank_integrations.errors import ClosedError
from core_rerank_integrations.method.list_scores import ScoredList
from core_rerank_integrations.method.windows import Candidates, truncated_documents
from core_rerank_integrations.ranking import check_options, rank
from core_rerank_integrations.reranker import CoReReranker
from core_rerank_integrations.results import RerankResults
from core_rerank_integrations.serving.errors import RefusedError
from core_rerank_integrations.settings import VLLM_BACKENDS, RerankOptions
from core_rerank_integrations.tracing import rerank_spans

if TYPE_CHECKING:
    from core_rerank_integrations.serving.metrics import Metrics

BATCH_DOCUMENTS = 32
BATCH_CHARACTERS = 16_000
"""Maximum size of a batch of several lists, and of a list that is read whole. Documents that
several lists hold count once, because they are read once. Larger batches bring nothing."""
BATCH_REQUESTS = 8
"""Maximum number of lists in a batch: each waits for the answers of all."""
DOCUMENT_CHARACTERS = 200
"""What a document costs besides its text: the instruction and the question are read too."""
FIRST_PART_CHARACTERS = 2_000
"""Size of the first part of a long list, whose speed is not known yet."""
PART_SECONDS = 0.25
"""Time that a later part should take. A short list waits for at most one."""
GATHER_SECONDS = 0.002
"""Time for other requests to arrive, where the model has nothing to do."""
ENGINE_BATCHES = 8
"""Batches that run at once in vLLM, which reads them together by itself."""


class Reading(NamedTuple):
    """How documents are read; only lists that are read alike are read together.

    Attributes:
        evidence: Whether their sentences are scored.
        max_document_tokens: Length to which documents are truncated.
        stores: Whether documents are stored, and nothing is ranked.
    """

    evidence: bool = False
    max_document_tokens: int | None = None
    stores: bool = False


@dataclass(eq=False)
class _Job:
    """A request in the queue.

    Attributes:
        query: The query.
        documents: All its documents.
        reading: How they are read.
        is_whole: Whether they are read in one part.
        deadline: When the time of the request ends; ``None`` for no limit.
        done: Gets the answers of all parts.
        read: Number of documents that were read.
        part_characters: Size of the next part.
        answers: The answers of the parts that were read.
        is_late: Whether the time of the request is up.
    """

    query: str
    documents: tuple[str, ...]
    reading: Reading
    is_whole: bool
    deadline: float | None
    done: asyncio.Future[list[Any]]
    read: int = 0
    part_characters: float = FIRST_PART_CHARACTERS
    answers: list[Any] = field(default_factory=list)
    is_late: bool = False

    @property
    def is_alone(self) -> bool:
        """Whether it is never read together with others."""
        return not self.is_whole or self.deadline is not None or self.reading.stores

    def next_part(self) -> _Part:
        """Return the documents of the next turn, at least one."""
        if self.is_whole:
            return _Part(self, self.documents)
        stop, size = self.read, 0
        while stop < len(self.documents):
            size += _characters(self.documents[stop : stop + 1])
            if stop > self.read and size > self.part_characters:
                break
            stop += 1
        return _Part(self, self.documents[self.read : stop])

    def add(self, part: _Part, answer: Any, seconds: float) -> None:
        """Add the answer of a part; set the size of the next one by the speed of this one."""
        self.answers.append(answer)
        self.read += len(part.documents)
        size = _characters(part.documents)
        self.part_characters = min(2 * size, size * PART_SECONDS / max(seconds, 1e-9))

    @property
    def is_over(self) -> bool:
        """Whether all is read, or the time is up."""
        return self.is_late or self.read == len(self.documents)


class _Part(NamedTuple):
    """The documents of one turn of a request."""

    job: _Job
    documents: tuple[str, ...]


class _Answer(NamedTuple):
    """What was read of a part.

    Attributes:
        scored: The scores.
        tokens: Number of tokens of the prompts.
        truncated: Indices of the documents whose end was not read.
    """

    scored: ScoredList
    tokens: int
    truncated: list[int]


class RankedList(NamedTuple):
    """The results of a request.

    Attributes:
        results: The results.
        tokens: Number of tokens of the prompts.
        truncated: Indices of the documents whose end was not read.
    """

    results: RerankResults
    tokens: int
    truncated: list[int]


class RequestQueue:
    """Rank the lists of all clients with one model. For one event loop.

    Args:
        reranker: The model.
        metrics: The figures of the server.
        max_waiting: Maximum number of requests in the queue, with those that are being read.
    """

    def __init__(self, reranker: CoReReranker, metrics: Metrics, max_waiting: int) -> None:
        self._reranker = reranker
        self._metrics = metrics
        self._max_waiting = max_waiting
        self._jobs: deque[_Job] = deque()
        self._requests: set[_Job] = set()
        self._filled = asyncio.Event()
        workers = ENGINE_BATCHES if reranker.backend in VLLM_BACKENDS else 1
        self._executor = ThreadPoolExecutor(workers, "core-rerank-queue")
        self._workers = [asyncio.create_task(self._work()) for _ in range(workers)]
        self._running: dict[tuple[_Part, ...], asyncio.Task[list[Any]]] = {}

    async def rank(
        self, candidates: Candidates, options: RerankOptions, max_document_tokens: int | None = None
    ) -> RankedList:
        """Rank a list; see `CoReReranker.rerank`. ``max_seconds`` includes the time of waiting.

        A list that waits until its time is up is not read any further.

        Args:
            candidates: The query and its documents.
            options: Options of the call.
            max_document_tokens: Longer documents are truncated to this length.

        Raises:
            InvalidInputError: The heads do not support an option, or the query is too long.
            RefusedError: The queue is full.
        """
        scoring = self._reranker.heads.scoring
        check_options(options, scoring)
        limits = [self._reranker.settings.max_document_tokens, max_document_tokens]
        reading = Reading(
            options.evidence, min((limit for limit in limits if limit is not None), default=None)
        )
        with rerank_spans(self._reranker.model, [candidates], options.top_n) as finish:
            answers: list[_Answer] = await self._answers(
                candidates.query, candidates.documents, reading, options.max_seconds
            )
            scored = _merged([answer.scored for answer in answers], len(candidates.documents))
            results = await run_in_thread(partial(rank, candidates, scored, scoring, options))
            finish([results])
        truncated, first = [], 0
        for answer in answers:
            truncated += [first + index for index in answer.truncated]
            first += len(answer.scored.scores)
        return RankedList(results, sum(answer.tokens for answer in answers), truncated)

    async def store(self, documents: tuple[str, ...]) -> int:
        """Read documents ahead; see `CoReReranker.cache_documents`.

        Returns:
            Number of bytes written.

        Raises:
            InvalidInputError: The heads read several documents per prompt.
            RefusedError: The queue is full.
        """
        return sum(await self._answers("", documents, Reading(stores=True), None))

    async def close(self) -> None:
        """End the requests that wait, and those that are being read."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        for job in self._requests:
            if not job.done.done():
                job.done.set_exception(ClosedError("the server was stopped"))
        self._executor.shutdown(wait=False)

    async def _answers(
        self, query: str, documents: tuple[str, ...], reading: Reading, max_seconds: float | None
    ) -> list[Any]:
        """Wait for the answers of all parts. A cancelled wait gives its place to others.

        Raises:
            RefusedError: The queue is full.
        """
        if not documents:
            return []
        if len(self._requests) >= self._max_waiting:
            raise RefusedError(
                429, f"{len(self._requests)} requests wait already: try again in a moment"
            )
        self._metrics.documents.inc(len(documents))
        job = _Job(
            query,
            documents,
            reading,
            _fits(documents) or self._reranker.heads.scoring.documents_per_prompt != 1,
            None if max_seconds is None else time.perf_counter() + max_seconds,
            asyncio.get_running_loop().create_future(),
        )
        self._requests.add(job)
        self._add(job)
        self._metrics.waiting.set(len(self._requests))
        timer = None
        if max_seconds is not None:
            timer = asyncio.get_running_loop().call_later(max_seconds, self._end, job)
        try:
            return await job.done
        finally:
            if timer is not None:
                timer.cancel()
            self._remove(job)

    def _add(self, job: _Job) -> None:
        self._jobs.append(job)
        self._filled.set()

    def _end(self, job: _Job) -> None:
        """Answer a request whose time is up with what was read of it.

        A part that is being read has the same limit, and is waited for.
        """
        job.is_late = True
        if job in self._jobs and not job.done.done():
            self._jobs.remove(job)
            job.done.set_result(job.answers)

    def _remove(self, job: _Job) -> None:
        self._requests.discard(job)
        self._metrics.waiting.set(len(self._requests))
        if job in self._jobs:
            self._jobs.remove(job)
        for batch, task in self._running.items():
            if all(part.job.done.done() for part in batch):  # Nobody waits for it any more.
                task.cancel()

    async def _work(self) -> None:
        while True:
            if not self._jobs:
                self._filled.clear()
                await self._filled.wait()
                await asyncio.sleep(GATHER_SECONDS)
            batch = self._next_batch()
            if batch:
                await self._read_batch(batch)

    def _next_batch(self) -> tuple[_Part, ...]:
        """Take the request whose turn it is, and others that can be read together with it."""
        if not self._jobs:  # All have hung up.
            return ()
        first = self._jobs.popleft()
        batch = [first.next_part()]
        if first.is_alone:
            return tuple(batch)
        documents = set(first.documents)
        for job in list(self._jobs):
            if len(batch) == BATCH_REQUESTS:
                break
            together = documents.union(job.documents)
            if not job.is_alone and job.reading == first.reading and _fits(together):
                documents = together
                self._jobs.remove(job)
                batch.append(job.next_part())
        return tuple(batch)

    async def _read_batch(self, batch: tuple[_Part, ...]) -> None:
        """Read a batch, and hand its answers or its error to the requests.

        Raises:
            CancelledError: The queue is closed.
        """
        begun = time.perf_counter()
        task = asyncio.create_task(run_in_thread(partial(self._read, batch), self._executor))
        self._running[batch] = task
        try:
            answers = await task
        except asyncio.CancelledError:
            worker = asyncio.current_task()
            if worker is not None and worker.cancelling():
                raise  # The queue is closed. Else all clients of the batch have hung up.
            return
        except Exception as failure:
            error = failure
            if not self._reranker.is_alive:  # vLLM's engine has died, with all its calls.
                error = RefusedError(503, "The model has died: try again in a moment")
            waiting = [part for part in batch if not part.job.done.done()]
            if len(batch) == 1:
                for part in waiting:
                    part.job.done.set_exception(error)
            else:  # The error of one request must not be that of the others.
                for part in waiting:
                    await self._read_batch((part,))
            return
        finally:
            del self._running[batch]
        seconds = time.perf_counter() - begun
        self._metrics.together.observe(len(batch))
        for part, answer in zip(batch, answers, strict=True):
            part.job.add(part, answer, seconds)
            if part.job.done.done():
                continue
            if part.job.is_over:
                part.job.done.set_result(part.job.answers)
            else:
                self._add(part.job)

    def _read(self, batch: Sequence[_Part]) -> list[Any]:
        """Read a batch in a thread."""
        job = batch[0].job
        if job.reading.stores:
            return [self._reranker.cache_documents(batch[0].documents)]
        scorer, heads = self._reranker.scorer, self._reranker.heads
        layout = heads.scoring.layout(
            job.reading.max_document_tokens, self._reranker.settings.max_query_tokens
        )
        lists = [Candidates(part.job.query, part.documents) for part in batch]
        plans = scorer.plan(lists, layout)
        remaining = None
        if job.deadline is not None:
            remaining = max(job.deadline - time.perf_counter(), 1e-9)
        scored = scorer.score(
            lists, heads, layout, max_seconds=remaining, evidence=job.reading.evidence
        )
        return [
            _Answer(
                scores,
                sum(len(window.prefix.ids) + len(window.question) for window in windows),
                truncated_documents(windows, part.documents),
            )
            for scores, windows, part in zip(scored, plans, batch, strict=True)
        ]


def _fits(documents: Collection[str]) -> bool:
    """Return whether one batch may hold documents."""
    return len(documents) <= BATCH_DOCUMENTS and _characters(documents) <= BATCH_CHARACTERS


def _characters(documents: Collection[str]) -> int:
    """Return the size of documents; it stands for the time that they take."""
    return sum(len(document) + DOCUMENT_CHARACTERS for document in documents)


def _merged(parts: Sequence[ScoredList], documents: int) -> ScoredList:
    """Combine the scores of parts; documents after the last one were not read."""
    unread = documents - sum(len(part.scores) for part in parts)
    return ScoredList(
        np.concatenate([*(part.scores for part in parts), np.full(unread, -np.inf)]),
        [span for part in parts for span in part.best_passages] + [None] * unread,
        [tokens for part in parts for tokens in part.tokens] + [[] for _ in range(unread)],
    )
