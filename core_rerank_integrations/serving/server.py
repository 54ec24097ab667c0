"""Runs the app until the program is stopped."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from core_rerank_integrations.errors import requires_extra
from core_rerank_integrations.serving.limits import Limits

with requires_extra("server"):
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    import asyncio
    import socket
    from types import FrameType

    from fastapi import FastAPI

MAX_CONNECTIONS = 2048
MAX_HEADER_BYTES = 1 << 16


class _Connection(H11Protocol):
    """A connection that is closed if its client keeps it busy and sends no request.

    uvicorn waits for the headers of a request, and for a client to read a reply, without limit. It
    limits only the time without a byte after a reply.
    """

    seconds: float
    """Time from the connection, or from a reply, to the end of the next request's headers. If a
    client is still reading the reply then, it has as long again, as often as it has gone on."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._timer.cancel()

    def on_response_complete(self) -> None:
        self._wait_for_request()
        super().on_response_complete()  # It may find that the next request is there.

    def _wait_for_request(self) -> None:
        self._unread = self.transport.get_write_buffer_size()
        self._timer = self.loop.call_later(self.seconds, self._end_wait)

    def _end_wait(self) -> None:
        if 0 < self.transport.get_write_buffer_size() < self._unread:
            self._wait_for_request()
        else:
            self.transport.abort()


class RerankServer(uvicorn.Server):
    """Serve the app; requests in progress are answered before it ends.

    Args:
        app: The app; see `create_app`.
        limits: The limits.
    """

    def __init__(self, app: FastAPI, limits: Limits) -> None:
        config = uvicorn.Config(
            app,
            # Of uvicorn's parsers, this one limits the size of headers.
            http=type("_Connection", (_Connection,), {"seconds": limits.max_body_seconds}),
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            ws="none",
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=limits.shutdown_seconds,
            access_log=False,
            log_level="warning",
            server_header=False,
        )
        super().__init__(config)
        self._service = app.state.service
        self._service.on_failure = self.stop

    def stop(self) -> None:
        """End soon. Requests on connections that stay open are refused from now on."""
        self._service.is_closing = True
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End at a signal of the system."""
        self._service.is_closing = True
        super().handle_exit(sig, frame)


def serve(app: FastAPI, listener: socket.socket, limits: Limits) -> None:
    """Serve until the program is stopped.

    Args:
        app: The app; see `create_app`.
        listener: Its socket.
        limits: The limits.

    Raises:
        BaseException: The model could not be loaded.
    """
    server = RerankServer(app, limits)
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    failure = app.state.service.failure
    if failure is not None:
        raise failure
