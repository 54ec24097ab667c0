"""The key, and bodies of limited size that arrive in limited time."""

from __future__ import annotations

import asyncio
import hmac
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from core_rerank_integrations._internal.web import limited, read_body, replayed
from core_rerank_integrations.errors import InvalidInputError, requires_extra
from core_rerank_integrations.serving.errors import RefusedError
from core_rerank_integrations.serving.limits import Limits
from core_rerank_integrations.serving.replies import error_reply

with requires_extra("server"):
    from starlette.datastructures import Headers

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

OPEN = ("/health", "/ready", "/metrics", "/docs", "/openapi.json")
"""Paths that need no key: they say nothing about requests but their number."""
HELD_BODIES = 32
"""Bodies of the maximum size that may be in memory at once."""


def key_from(variable: str | None) -> str | None:
    """Return the key that an environment variable holds; ``None`` for no variable.

    Raises:
        InvalidInputError: The variable holds no key.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "")
    if not key or not key.isascii() or key != key.strip():
        raise InvalidInputError(
            f"the environment variable {variable} must hold the key, in ASCII and without spaces "
            "around it"
        )
    return key


class Guard:
    """Refuse requests without the key, and read bodies of limited size in limited time.

    Args:
        app: The application.
        limits: The limits.
        api_keys: The keys, of which a request has to carry one; without any, everyone is let in.
        is_closing: Whether the server is being stopped.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, api_keys: Sequence[str], is_closing: Callable[[], bool]
    ) -> None:
        self._app = app
        self._limits = limits
        self._expected = [f"Bearer {key}".encode() for key in api_keys]
        self._is_closing = is_closing
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on with its whole body."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        path = scope.get("path", "")
        if scope["type"] == "lifespan" or path in OPEN or path.startswith("/docs/"):
            await self._app(scope, receive, send)
            return
        held = 0
        try:
            body = b""
            headers = Headers(scope=scope)
            self._check(headers)
            if scope["method"] == "POST":
                held = self._room_for(headers)
                self._held += held
                found = await self._body(receive)
                if found is None:
                    return
                body = found
                self._held += len(body) - held  # Its length may not have been known.
                held = len(body)
            await self._app(scope, replayed(body, receive), send)
        except RefusedError as error:
            await error_reply(error.status, error.message)(scope, receive, send)
        finally:
            self._held -= held

    def _check(self, headers: Headers) -> None:
        given = headers.get("authorization", "").encode()
        known = [hmac.compare_digest(given, expected) for expected in self._expected]
        if known and not any(known):
            raise RefusedError(
                401, "The API key is missing or wrong: send it as 'Authorization: Bearer KEY'"
            )
        if self._is_closing():
            raise RefusedError(503, "The server is being stopped: try again later")

    def _room_for(self, headers: Headers) -> int:
        """Return how many bytes a body may take.

        Raises:
            RefusedError: It is too large, or too many are in memory.
        """
        limit = self._limits.max_body_bytes
        # With both headers, the length does not count.
        is_chunked = "transfer-encoding" in headers
        length = str(limit) if is_chunked else headers.get("content-length", str(limit))
        if not length.isdecimal() or len(length) > 20 or int(length) > limit:
            raise self._too_large()
        if self._held + int(length) > HELD_BODIES * limit:
            raise RefusedError(429, "Too many bytes of other requests are in memory: try later")
        return int(length)

    async def _body(self, receive: Receive) -> bytes | None:
        try:
            async with asyncio.timeout(self._limits.max_body_seconds):
                return await read_body(
                    limited(receive, self._limits.max_body_bytes, self._too_large())
                )
        except TimeoutError as error:
            raise RefusedError(
                408,
                f"The request did not arrive within {self._limits.max_body_seconds:g} seconds",
            ) from error

    def _too_large(self) -> RefusedError:
        return RefusedError(
            413,
            f"The request is larger than {self._limits.max_body_bytes} bytes: send fewer or "
            "shorter documents",
        )
