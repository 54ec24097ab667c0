"""Runs the app until the program is stopped."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from core_rerank_integrations.errors import requires_extra
from core_rerank_integrations.serving.limits import Limits

with requires_extra("server"):
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    import socket
    from types import FrameType

    from fastapi import FastAPI

MAX_CONNECTIONS = 2048
MAX_HEADER_BYTES = 1 << 16
KEEP_ALIVE_SECONDS = 75
"""Time that a connection stays open after a reply. Balancers keep theirs for up to a minute, and
would send a request on one that is being closed."""
REPLY_SECONDS = 5
"""Time for replies to requests that were ended when the server is stopped."""


class _Connection(H11Protocol):
    """A connection that is closed if its client neither sends a request nor reads a reply.

    uvicorn waits for the headers of a request, and for a client to read a reply, without limit. It
    limits only the time without a byte after a reply.
    """

    seconds: float
    """Time from the connection, or from the first byte of a request, to the end of its headers; and
    for a client to read a reply. One that is still reading has as long again, as often as it has
    gone on."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._sending: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None
        self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._sending, self._reading):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._wait_for_headers()
        super().data_received(data)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and self._sending is not None:
            self._sending.cancel()
            self._sending = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_reader()

    def on_response_complete(self) -> None:
        self._wait_for_reader()
        super().on_response_complete()  # It may find that the next request is there.
        has_part_of_next = bool(self.conn.trailing_data[0])
        if self.cycle.response_complete and has_part_of_next:
            self._wait_for_headers()

    def _wait_for_headers(self) -> None:
        """Close the connection if no request has begun when the time is over."""
        if self._sending is None:
            self._sending = self.loop.call_later(self.seconds, self.transport.abort)

    def _wait_for_reader(self) -> None:
        """Close the connection if the client has read nothing of a reply when the time is over."""
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
        if unread := self.transport.get_write_buffer_size():
            self._reading = self.loop.call_later(self.seconds, self._end_reading, unread)

    def _end_reading(self, unread: int) -> None:
        if self.transport.get_write_buffer_size() < unread:
            self._wait_for_reader()
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
            timeout_graceful_shutdown=limits.shutdown_seconds + REPLY_SECONDS,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            access_log=False,
            log_level="warning",
            server_header=False,
        )
        super().__init__(config)
        self._service = app.state.service
        self._service.on_failure = self.stop
        self._shutdown_seconds = limits.shutdown_seconds

    def stop(self) -> None:
        """End soon. Requests on connections that stay open are refused from now on."""
        self._service.is_closing = True
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End at a signal of the system."""
        self._service.is_closing = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for requests in progress, and end those that take too long with a reply."""

        async def end_requests() -> None:
            await asyncio.sleep(self._shutdown_seconds)
            await self._service.end_requests()

        ending = asyncio.create_task(end_requests())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()


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
