"""The web server of the page: its address, and which requests it answers."""

from __future__ import annotations

import ipaddress
import json
import logging
import re
import time
import webbrowser
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from core_rerank_integrations._internal import web
from core_rerank_integrations._internal.web import LOCAL_NAMES, read_body, replayed, url_of
from core_rerank_integrations.errors import requires_extra

with requires_extra("chat"):
    import uvicorn
    from starlette.datastructures import Headers, MutableHeaders
    from starlette.exceptions import HTTPException
    from starlette.responses import PlainTextResponse

if TYPE_CHECKING:
    import socket

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

FIRST_PORT, PORTS = 7860, 100
MAX_JSON_BYTES = 1 << 20
MAX_UPLOAD_BYTES = 80 << 20
"""Maximum size of the files that are dropped at once."""
MAX_WAITING_BYTES = 4 * MAX_UPLOAD_BYTES
"""Maximum size of uploads that have not been read yet, over all visitors."""
ABANDONED_SECONDS = 3600
"""Age at which an upload that nothing has read is deleted."""
CLOSE_SECONDS = 1
"""Time for answers in progress when the server stops."""

_API = "/gradio_api"
UPLOAD = f"{_API}/upload"
# What the page asks for. Gradio's other routes, such as its proxy, are closed.
_GET = re.compile(
    r"/|/(?:config|theme\.css|favicon\.ico|manifest\.json)|/(?:assets|static|svelte)/.+"
    rf"|{_API}/(?:info|app_id|theme\.css|startup-events|upload_progress|queue/data|heartbeat/\w+)"
)
_POST = {
    f"{_API}/queue/join": MAX_JSON_BYTES,
    f"{_API}/cancel": MAX_JSON_BYTES,
    f"{_API}/reset": MAX_JSON_BYTES,
    UPLOAD: MAX_UPLOAD_BYTES,
}
# Gradio's page needs inline scripts and `eval`. Nothing comes from, or goes to, another server.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'none'; object-src 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def listen(host: str, port: int | None) -> socket.socket:
    """Open the socket of the page. Browsers that connect to it wait until `serve`.

    Args:
        host: The address. Other machines cannot reach ``127.0.0.1``.
        port: The port; ``None`` selects the first free one from `FIRST_PORT`.

    Raises:
        InvalidInputError: The address is in use or does not exist.
    """
    ports = [port] if port else range(FIRST_PORT, FIRST_PORT + PORTS)
    return web.listen(host, ports)


def serve(app: ASGIApp, listener: socket.socket, opens: bool) -> None:
    """Serve the page until the program is interrupted.

    Args:
        app: The page; see `Guard`.
        listener: The socket; see `listen`.
        opens: Whether to open a browser.
    """
    url = url_of(listener)
    config = uvicorn.Config(
        app, log_level="warning", server_header=False, timeout_graceful_shutdown=CLOSE_SECONDS
    )
    print(f"Open {url} in a browser; Ctrl+C ends.", flush=True)
    if opens:
        webbrowser.open(url)
    with suppress(KeyboardInterrupt):
        _Server(config).run(sockets=[listener])


class _Server(uvicorn.Server):
    def handle_exit(self, *arguments: Any) -> None:
        # Open pages hold connections, and an error is logged for each when they are closed.
        logging.getLogger("uvicorn.error").disabled = True
        super().handle_exit(*arguments)


class Guard:
    """Refuse requests that the page does not send, before Gradio reads them.

    Web pages of other sites run in the same browser, which reaches this server. They cannot read
    or change documents: the ``Host`` must be a name of this server, because any name can be made
    to point at ``127.0.0.1``; the ``Origin`` must be the page itself; no page can hold this one in
    a frame.

    Files that a request names must be uploads. Gradio would read any file of this machine, and
    download any URL.

    Args:
        app: The application.
        host: The address that the server listens on.
        names: More names of the server.
        uploads: Folder of the uploads.
    """

    def __init__(
        self, app: ASGIApp, *, host: str, names: Sequence[str] = (), uploads: Path
    ) -> None:
        self._app = app
        self._own_names = {_plain(name) for name in names}
        self._names = {*LOCAL_NAMES, _plain(host), *self._own_names}
        # A name can be made to point at any machine; an address belongs to its machine.
        self._takes_addresses = _plain(host) in ("0.0.0.0", "::")  # noqa: S104
        self._uploads = uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        try:
            limit = self._check(scope)
            limited = web.limited(receive, limit, HTTPException(413, _too_large(limit)))
            if scope["method"] == "POST" and scope["path"] != UPLOAD:
                limited = await self._with_checked_files(limited)
        except HTTPException as error:
            response = PlainTextResponse(error.detail, error.status_code)
            await response(scope, receive, send_with_headers)
            return
        await self._app(scope, limited, send_with_headers)

    def _check(self, scope: Scope) -> int:
        """Return the maximum size of the body of a request.

        Raises:
            HTTPException: The request is refused.
        """
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._is_name(_hostname(host)):
            raise HTTPException(
                421,
                f"This server has no name {host!r}. Open it under the address that it printed, or "
                "start it with: --allowed-host NAME",
            )
        self._check_origin(headers, host, scope["method"])
        path = scope["path"]
        if scope["method"] in ("GET", "HEAD") and _GET.fullmatch(path):
            limit = 0
        elif scope["method"] == "POST" and path in _POST:
            limit = _POST[path]
        else:
            raise HTTPException(404, "The page does not use this address.")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > limit:
            raise HTTPException(413, _too_large(limit))
        if path == UPLOAD:
            self._make_room()
        return limit

    def _check_origin(self, headers: Headers, host: str, method: str) -> None:
        """Check that the page itself has sent the request, or that somebody opens it.

        Raises:
            HTTPException: Another page has sent it.
        """
        origin = headers.get("origin")
        netloc = origin.lower().partition("://")[2] if origin else host.lower()
        # A proxy may change the host.
        is_own = netloc == host.lower() or _hostname(netloc) in self._own_names
        is_opened = method == "GET" and headers.get("sec-fetch-dest") == "document"
        site = headers.get("sec-fetch-site", "none")
        if not is_own or (site not in ("same-origin", "none") and not is_opened):
            raise HTTPException(403, "Pages of other sites cannot use this one.")

    async def _with_checked_files(self, receive: Receive) -> Receive:
        """Return a function that receives the same JSON.

        Raises:
            HTTPException: The body is not JSON, or names a file that is not an upload.
        """
        body = await read_body(receive)
        if body is None:
            return receive
        try:
            found = [json.loads(body)]
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, "The request is not JSON.") from error
        while found:
            value = found.pop()
            if isinstance(value, dict):
                if "path" in value and not self._is_upload(value["path"]):
                    raise HTTPException(403, "The request names a file that is not an upload.")
                found += value.values()
            elif isinstance(value, list):
                found += value
        return replayed(body, receive)

    def _is_upload(self, path: object) -> bool:
        try:
            return Path(str(path)).resolve().is_relative_to(self._uploads.resolve())
        except (OSError, ValueError):
            return False

    def _is_name(self, name: str) -> bool:
        return name in self._names or (self._takes_addresses and _is_address(name))

    def _make_room(self) -> None:
        """Delete abandoned uploads.

        Raises:
            HTTPException: Too many uploads wait to be read.
        """
        waiting = 0
        for path in self._uploads.rglob("*"):
            try:
                status = path.stat()
                if not path.is_file():
                    continue
                if time.time() - status.st_mtime > ABANDONED_SECONDS:
                    path.unlink()
                else:
                    waiting += status.st_size
            except FileNotFoundError:  # It has just been read.
                continue
        if waiting > MAX_WAITING_BYTES:
            raise HTTPException(429, "Too many files wait to be read: try again later.")


def _too_large(limit: int) -> str:
    return f"The request is larger than {limit >> 10:,} KiB."


def _plain(name: str) -> str:
    return name.strip("[]").lower().removesuffix(".")


def _hostname(netloc: str) -> str:
    """Return the name in ``name:port``, or an empty string if it is not one."""
    try:
        return _plain(urlsplit(f"//{netloc}").hostname or "")
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
