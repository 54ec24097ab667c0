"""Runs rerank servers in threads of the test process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import httpx

from core_rerank_integrations import CoReReranker
from core_rerank_integrations._internal.web import listen, url_of
from core_rerank_integrations.serving.app import create_app
from core_rerank_integrations.serving.limits import Limits
from core_rerank_integrations.serving.server import RerankServer

READY_SECONDS = 120


class Running(NamedTuple):
    """A server in a thread of this process."""

    url: str
    server: RerankServer
    client: httpx.Client

    def wait_until_ready(self) -> None:
        end = time.monotonic() + READY_SECONDS
        while self.client.get("/ready").status_code != 200:
            assert time.monotonic() < end, "the server is not ready"
            time.sleep(0.01)


@contextmanager
def running(
    load: Callable[[], CoReReranker], api_key: str | None = None, **limits: float
) -> Iterator[Running]:
    """Run a server at a free port.

    Yields:
        The server; it may still be loading its model.
    """
    checked = Limits.checked(**limits)
    with listen("127.0.0.1", [0]) as listener:
        server = RerankServer(create_app(load, checked, api_key), checked)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        url = url_of(listener)
        try:
            with httpx.Client(base_url=url, headers=headers, timeout=READY_SECONDS) as client:
                yield Running(url, server, client)
        finally:
            server.stop()
            thread.join(READY_SECONDS)
            assert not thread.is_alive()
