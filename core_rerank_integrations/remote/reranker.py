"""`RemoteReranker`: the calls of a `CoReReranker`, answered by a server."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

from pydantic import SecretStr

from core_rerank_integrations._internal.cancellation import run_in_thread
from core_rerank_integrations._internal.closing import Closeable
from core_rerank_integrations._internal.loop_thread import LoopThread
from core_rerank_integrations._internal.progress import progress_bar
from core_rerank_integrations._internal.warnings import warn_caller
from core_rerank_integrations.errors import (
    ClosedError,
    DocumentTruncatedWarning,
    InvalidInputError,
)
from core_rerank_integrations.method.windows import Candidates
from core_rerank_integrations.ranking import check_candidates, check_documents, check_requests
from core_rerank_integrations.remote.replies import Answer, answer_of, bytes_written
from core_rerank_integrations.results import RerankResults
from core_rerank_integrations.settings import RerankKeywords, RerankOptions, ServerSettings
from core_rerank_integrations.tracing import rerank_spans

if TYPE_CHECKING:
    from core_rerank_integrations.remote.connection import Connection

API_KEY_VARIABLE = "CORE_RERANK_API_KEY"
CACHED_DOCUMENTS, CACHED_CHARACTERS = 32, 100_000
"""Maximum size of a request that caches documents; a server may allow less."""
CLOSED = "this RemoteReranker is closed; make a new one"


class RemoteReranker(Closeable):
    """Rerank documents by a server: `core-rerank serve`, or its routes in vLLM.

    It has the calls of `CoReReranker`, and returns the same results. This process needs neither a
    model nor a library that runs one. Instances are thread-safe, work with any event loop and in
    forks, and are context managers (``with`` and ``async with``). All calls share one pool of
    connections.

    A request is repeated if the server is busy (status 429, 502 or 503) or cannot be reached, after
    growing random times, and not before the time in the server's ``Retry-After``. A
    `DocumentTruncatedWarning` names the documents that the server has truncated.

    Examples:
        >>> reranker = RemoteReranker("http://127.0.0.1:8080")
        >>> reranker.rerank("who invented the telephone?", ["a recipe", "Bell's patent"], top_n=1)
        [RerankResult(index=1, score=..., document="Bell's patent")]

    Args:
        base_url: Address of the server, with the path that its routes are below, if any.
        api_key: The server's key; ``None`` selects the environment variable
            ``CORE_RERANK_API_KEY``. It is sent to this server alone: redirects are not followed.
            It is neither pickled nor part of any message.
        timeout: Seconds after which the request of a list is a `BackendError`, retries included.
        max_retries: How often a request is repeated; 0 for never.

    Attributes:
        base_url: Address of the server.
        settings: The settings it was created with.

    Raises:
        InvalidInputError: An argument is invalid.
        MissingExtraError: HTTPX or Tenacity is not installed.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | SecretStr | None = None,
        *,
        timeout: float = 60.0,
        max_retries: int = 3,
    ) -> None:
        # A SecretStr from here on, because errors show arguments.
        given = SecretStr(api_key) if isinstance(api_key, str) else api_key
        self.settings = ServerSettings.checked(
            base_url=base_url, api_key=given, timeout=timeout, max_retries=max_retries
        )
        if self.settings.base_url is None:
            raise InvalidInputError("base_url is missing: pass the address of a server")
        self.base_url = self.settings.base_url
        # Only this class needs the libraries of the extra, and not those who import it.
        from core_rerank_integrations.remote.connection import connected

        self._connected = partial(connected, self.settings, _api_key(given))
        self._is_closed = False
        # For each process, because threads do not survive a fork. A fork keeps those of its parent:
        # freeing an event loop would change what the parent's waits for.
        self._threads: dict[int, LoopThread[Connection]] = {}
        self._locks: dict[int, threading.Lock] = {}

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        first_stage_scores: Sequence[float] | None = None,
        **options: Unpack[RerankKeywords],
    ) -> RerankResults:
        """Rank documents by their relevance to a query.

        Args:
            query: The query; not empty.
            documents: Texts of the documents; ties keep their order.
            first_stage_scores: The first stage's score of each document; see `CoReReranker.rerank`.
            **options: Fields of `RerankOptions`: ``top_n``, ``score_threshold``, ``min_score``,
                ``first_stage``, ``max_seconds``, ``evidence``.

        Returns:
            Results sorted by score, best first.

        Raises:
            InvalidInputError: See `CoReReranker.rerank`; or the server refuses the key, or the
                size of the request.
            BackendError: The server cannot be reached, fails, stays busy, does not answer in time,
                or is not one of this package.
            ClosedError: The reranker is closed, before or meanwhile.
        """
        (results,) = self._rank([check_candidates(query, documents, first_stage_scores)], options)
        return results

    def rerank_batch(
        self,
        requests: Iterable[tuple[str, Sequence[str]]],
        *,
        first_stage_scores: Sequence[Sequence[float]] | None = None,
        **options: Unpack[RerankKeywords],
    ) -> list[RerankResults]:
        """Rank several lists at once, one request for each.

        Args:
            requests: (query, documents) pairs.
            first_stage_scores: The first stage's scores of each list; see `rerank`.
            **options: Fields of `RerankOptions`, for all lists. ``max_seconds`` limits the time
                of all lists together.

        Returns:
            The results of each list; see `rerank`.

        Raises:
            InvalidInputError: See `rerank`; or ``first_stage_scores`` does not hold one list of
                scores per request.
            BackendError: See `rerank`. The other lists are then given up.
            ClosedError: See `rerank`.
        """
        return self._rank(check_requests(requests, first_stage_scores), options)

    async def arerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        first_stage_scores: Sequence[float] | None = None,
        **options: Unpack[RerankKeywords],
    ) -> RerankResults:
        """Rank documents without blocking the event loop; see `rerank`.

        A cancelled call hangs up, and the server then stops reading.
        """
        lists = [check_candidates(query, documents, first_stage_scores)]
        checked = RerankOptions.checked(**options)
        thread = self._threads.get(os.getpid())
        if thread is None:
            thread = await run_in_thread(self._thread)
        with rerank_spans(self.base_url, lists, checked.top_n) as finish:
            results = _warned(await thread.arun(partial(self._ranked, lists, checked)))
            finish(results)
        return results[0]

    def cache_documents(self, documents: Sequence[str], *, show_progress: bool = False) -> int:
        """Have the server read documents before a question is asked, and store them.

        Args:
            documents: Texts of the documents, as they will be reranked.
            show_progress: Whether to show a progress bar on standard error.

        Returns:
            Number of bytes that the server has written.

        Raises:
            InvalidInputError: A document is not a string, or too large for the server; or the
                server does not store documents.
            BackendError: See `rerank`.
            ClosedError: See `rerank`.
        """
        texts = check_documents(documents)
        written = self._cached(texts)
        return sum(progress_bar(show_progress, "Caching documents")(written, len(texts)))

    def close(self) -> None:
        """Close the connections.

        Waiting and later calls raise `ClosedError`. Closing twice has no effect.
        """
        with self._lock:
            self._is_closed = True
            thread = self._threads.get(os.getpid())
        if thread is not None:
            thread.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings without the key, which is taken from the environment again."""
        return _rebuild, (self.settings.model_dump(),)

    def __repr__(self) -> str:
        return f"RemoteReranker({self.base_url!r})"

    @property
    def _lock(self) -> threading.Lock:
        return self._locks.setdefault(os.getpid(), threading.Lock())

    def _thread(self) -> LoopThread[Connection]:
        """Return the thread of this process, which is started by the first call.

        Raises:
            ClosedError: The reranker is closed.
        """
        with self._lock:
            if self._is_closed:
                raise ClosedError(CLOSED)
            thread = self._threads.get(os.getpid())
            if thread is None:
                thread = LoopThread(self._connected, "core-rerank-client", CLOSED)
                self._threads[os.getpid()] = thread
            return thread

    def _rank(self, lists: list[Candidates], options: RerankKeywords) -> list[RerankResults]:
        checked = RerankOptions.checked(**options)
        with rerank_spans(self.base_url, lists, checked.top_n) as finish:
            results = _warned(self._thread().run(partial(self._ranked, lists, checked)))
            finish(results)
        return results

    async def _ranked(
        self, lists: list[Candidates], options: RerankOptions, connection: Connection
    ) -> list[Answer]:
        """Send a request for each list. The first error ends the others."""
        url = f"{self.base_url}/v1/rerank"
        begun = time.monotonic()

        async def ranked(candidates: Candidates) -> Answer:
            async with connection.slots:
                reply = await connection.post(
                    url, lambda: _body(candidates, options, time.monotonic() - begun)
                )
            return answer_of(reply, candidates.documents, url)

        tasks = [asyncio.create_task(ranked(candidates)) for candidates in lists]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def _cached(self, documents: Sequence[str]) -> Iterator[int]:
        """Yield the number of bytes written, for each document; those of a part at its first."""
        from core_rerank_integrations.remote.connection import TooLargeError

        url = f"{self.base_url}/v1/documents"

        async def cached(part: Sequence[str], connection: Connection) -> int:
            try:
                async with connection.slots:
                    reply = await connection.post(url, lambda: {"documents": part})
            except TooLargeError:
                if len(part) == 1:
                    raise
                half = len(part) // 2
                return await cached(part[:half], connection) + await cached(part[half:], connection)
            return bytes_written(reply, url)

        for part in _parts(documents):
            yield self._thread().run(partial(cached, part))
            yield from [0] * (len(part) - 1)


def _warned(answers: Sequence[Answer]) -> list[RerankResults]:
    """Return the results. Issue the warnings, here in the thread of the caller."""
    for answer in answers:
        for text in answer.warnings:
            warn_caller(text, DocumentTruncatedWarning)
    return [answer.results for answer in answers]


def _body(candidates: Candidates, options: RerankOptions, seconds: float) -> dict[str, Any]:
    """Return the body of a request.

    Args:
        candidates: The query and its documents.
        options: Options of the call.
        seconds: Time of the call that is over.
    """
    body = {
        "query": candidates.query,
        "documents": candidates.documents,
        "return_documents": False,
        **options.model_dump(exclude_none=True),
    }
    if candidates.first_stage_scores is not None:
        body["first_stage_scores"] = candidates.first_stage_scores.tolist()
    if options.max_seconds is not None:
        body["max_seconds"] = max(options.max_seconds - seconds, 1e-9)
    return body


def _parts(documents: Sequence[str]) -> Iterator[list[str]]:
    """Divide documents among requests.

    Yields:
        The documents of a request.
    """
    part: list[str] = []
    characters = 0
    for document in documents:
        characters += len(document)
        if part and (len(part) == CACHED_DOCUMENTS or characters > CACHED_CHARACTERS):
            yield part
            part, characters = [], len(document)
        part.append(document)
    if part:
        yield part


def _api_key(given: SecretStr | None) -> SecretStr | None:
    """Return the key to send; ``None`` for none.

    Raises:
        InvalidInputError: No header can hold it.
    """
    key = os.environ.get(API_KEY_VARIABLE, "") if given is None else given.get_secret_value()
    if not all("!" <= character <= "~" for character in key):
        raise InvalidInputError(
            f"the API key, of api_key or {API_KEY_VARIABLE}, holds a character that is not visible "
            "ASCII, such as a line break: a request cannot send it"
        )
    return SecretStr(key) if key else None


def _rebuild(settings: dict[str, Any]) -> RemoteReranker:
    return RemoteReranker(**settings)
