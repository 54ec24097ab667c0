"""What the web servers of this package share: their address, and bodies of limited size."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from core_rerank_integrations.errors import InvalidInputError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


def listen(host: str, ports: Sequence[int]) -> socket.socket:
    """Open a socket at the first free port. Clients that connect to it wait until it is served.

    Args:
        host: The address. Other machines cannot reach ``127.0.0.1``.
        ports: The ports to try, in order.

    Raises:
        InvalidInputError: The address is in use or does not exist.
    """
    failure: OSError | None = None
    for port in ports:
        try:
            return _listen(host.strip("[]"), port)
        except OSError as error:
            failure = error
    where = f"{host}:{ports[0]}" if len(ports) == 1 else f"{host}, ports {ports[0]} to {ports[-1]}"
    raise InvalidInputError(
        f"cannot listen on {where} ({failure}); stop the program that uses it, or pass another "
        "--port or --host"
    ) from failure


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # On Windows, the option allows two servers on one port.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the URL under which this machine reaches a socket."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "localhost"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def limited(receive: Receive, limit: int, error: Exception) -> Receive:
    """Return a function that receives at most ``limit`` bytes of a body.

    Args:
        receive: Receives the messages of a request.
        limit: Maximum size of its body in bytes.
        error: Raised by a larger body.
    """
    received = 0

    async def receive_limited() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise error
        return message

    return receive_limited


async def read_body(receive: Receive) -> bytes | None:
    """Return the whole body of a request; ``None`` if the client hung up before its end."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)


def replayed(body: bytes, receive: Receive) -> Receive:
    """Return a function that receives a body that was read, and then what follows it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again
