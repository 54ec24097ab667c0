"""Runs the app until the program is stopped."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from core_rerank_integrations.errors import requires_extra
from core_rerank_integrations.serving.limits import Limits

with requires_extra("server"):
    import uvicorn

if TYPE_CHECKING:
    import socket
    from types import FrameType

    from fastapi import FastAPI

MAX_CONNECTIONS = 2048
MAX_HEADER_BYTES = 1 << 16


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
            http="h11",
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
