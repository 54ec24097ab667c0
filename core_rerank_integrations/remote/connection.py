"""Requests to a server: one pool of connections, time limits, retries, errors."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

from pydantic import SecretStr

from core_rerank_integrations.errors import (
    BackendError,
    CoReError,
    InvalidInputError,
    requires_extra,
)
from core_rerank_integrations.method.prompt import encodable
from core_rerank_integrations.settings import ServerSettings

with requires_extra("client"):
    import httpx
    from tenacity import (
        AsyncRetrying,
        RetryCallState,
        retry_if_exception_type,
        stop_after_attempt,
        stop_before_delay,
        wait_random_exponential,
    )

Body = Callable[[], Mapping[str, Any]]
"""Returns the body of an attempt, which may depend on the time."""

MAX_CONNECTIONS = 32
"""Number of requests that run at once; more requests wait."""
CONNECT_SECONDS = 5.0
"""Time limit of one attempt to connect."""
MAX_MESSAGE = 500
"""Number of characters of a server's message in an error."""

_BUSY = {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE}
_UNREACHED = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout)
_backoff = wait_random_exponential(multiplier=0.5, max=8)
_log = logging.getLogger(__name__)


class TooLargeError(InvalidInputError):
    """The server refuses the size of a request."""


class _BusyError(Exception):
    """A reply that asks to come again."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__(f"status {response.status_code}")
        self.response = response


class Connection:
    """Send requests to a server, from the event loop that opened the client.

    Args:
        client: The pool of connections.
        settings: Time limit and number of retries.
        api_key: The server's key, which no error contains.

    Attributes:
        slots: Limits the requests that run at once; a caller of `post` holds one.
    """

    def __init__(
        self, client: httpx.AsyncClient, settings: ServerSettings, api_key: SecretStr | None
    ) -> None:
        self._client = client
        self._timeout = settings.timeout
        self._max_retries = settings.max_retries
        self._api_key = api_key
        self.slots = asyncio.Semaphore(MAX_CONNECTIONS)

    async def post(self, url: str, body: Body) -> Any:
        """Return the JSON of a reply.

        Raises:
            InvalidInputError: The server refuses the key or the request.
            TooLargeError: The server refuses the size of the request.
            BackendError: The server cannot be reached, fails, is busy, takes too long, or does not
                answer with JSON.
        """
        try:
            async with asyncio.timeout(self._timeout):
                response = await self._answer(url, body)
        except (TimeoutError, httpx.TimeoutException) as error:
            raise BackendError(
                f"{url} did not answer within {self._timeout:g} s: raise timeout, send fewer "
                "documents, or set max_seconds"
            ) from error
        except httpx.HTTPError as error:
            raise BackendError(
                f"cannot reach {url} ({error or type(error).__name__}): check base_url, and that "
                "`core-rerank serve` runs there"
            ) from error
        except _BusyError as error:
            raise self._error(url, error.response) from None
        if not response.is_success:
            raise self._error(url, response)
        try:
            return response.json()
        except ValueError:  # Bytes that are not text as well.
            raise BackendError(
                f"{url} did not answer with JSON, but with {response.text[:80]!r}: check base_url"
            ) from None

    async def _answer(self, url: str, body: Body) -> httpx.Response:
        """Send a request until the server answers it, as long as there are retries and time."""
        attempts = AsyncRetrying(
            retry=retry_if_exception_type((_BusyError, *_UNREACHED)),
            wait=_seconds_to_wait,
            stop=stop_after_attempt(self._max_retries + 1) | stop_before_delay(self._timeout),
            before_sleep=_log_retry,
            reraise=True,
        )
        return await attempts(self._send, url, body)

    async def _send(self, url: str, body: Body) -> httpx.Response:
        content = encodable(json.dumps(body(), ensure_ascii=False)).encode()
        response = await self._client.post(url, content=content)
        if response.status_code in _BUSY:
            raise _BusyError(response)
        return response

    def _error(self, url: str, response: httpx.Response) -> CoReError:
        """Return the error of a reply."""
        status = response.status_code
        message = f"{url} answered {status}: {self._without_key(_message(response))}"
        if response.has_redirect_location:
            target = response.headers["location"].partition("?")[0]
            return BackendError(
                f"{url} redirects to {target!r}, and redirects are not followed, so that the key "
                "goes to no other server: check base_url"
            )
        if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
            return InvalidInputError(
                f"{message}; pass the server's api_key, or set CORE_RERANK_API_KEY"
            )
        if status in {HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED}:
            return InvalidInputError(f"{message}; check base_url")
        if status in _BUSY:
            return BackendError(
                f"{message}; it is busy or starting: try again later, or raise max_retries and "
                "timeout"
            )
        if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            return TooLargeError(message)
        if response.is_client_error:
            return InvalidInputError(message)
        return BackendError(f"{message}; see the server's log")

    def _without_key(self, message: str) -> str:
        key = self._api_key.get_secret_value() if self._api_key else ""
        return message.replace(key, "...") if key else message


@asynccontextmanager
async def connected(
    settings: ServerSettings, api_key: SecretStr | None
) -> AsyncIterator[Connection]:
    """Open a connection of the running event loop.

    Args:
        settings: Time limit and number of retries.
        api_key: The server's key.

    Yields:
        The connection.
    """
    headers = {"Content-Type": "application/json"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key.get_secret_value()}"
    async with httpx.AsyncClient(
        headers=headers,
        timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),  # `post` limits the whole request.
        limits=httpx.Limits(max_connections=MAX_CONNECTIONS),
        follow_redirects=False,
    ) as client:
        yield Connection(client, settings, api_key)


def _seconds_to_wait(state: RetryCallState) -> float:
    """Return the time until the next attempt: at least what the server asks for."""
    error = state.outcome.exception() if state.outcome else None
    asked = _retry_after(error.response) if isinstance(error, _BusyError) else 0.0
    return asked + _backoff(state)


def _retry_after(response: httpx.Response) -> float:
    value = response.headers.get("retry-after", "")
    try:
        if value.isdecimal():
            return float(value)
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):  # Not a date, or one without a time zone.
        return 0.0


def _log_retry(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    _log.info("%r; trying again in %.1f s", error, state.upcoming_sleep)


def _message(response: httpx.Response) -> str:
    """Return a server's own words, in the dialects of Cohere, Jina, OpenAI and TEI."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if isinstance(body, dict):
        for message in (body.get("error"), body.get("message"), body.get("detail")):
            message = message.get("message") if isinstance(message, dict) else message
            if message:
                return str(message)[:MAX_MESSAGE]
    return response.text[:MAX_MESSAGE] or response.reason_phrase
