"""A real HTTP server on this machine that ranks by shared words, or answers what it is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], Any]
"""Status, headers, and a body: text, or what becomes JSON."""


@dataclass(frozen=True)
class Received:
    path: str
    headers: dict[str, str]
    body: Any
    connection: tuple[str, int]
    time: float


@dataclass
class CannedServer:
    """What the server has received, and what it says next.

    Attributes:
        url: Its address.
        answers: Answers to the next requests, or functions that make them; then it ranks.
        received: The requests.
    """

    url: str
    answers: list[Answer | Callable[[Received, Handler], Answer | None]] = field(
        default_factory=list
    )
    received: list[Received] = field(default_factory=list)

    @property
    def bodies(self) -> list[Any]:
        return [request.body for request in self.received]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    canned: CannedServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Received(self.path, headers, body, self.client_address, time.monotonic())
        self.canned.received.append(request)
        answer: Any = self.canned.answers.pop(0) if self.canned.answers else answered
        if callable(answer):
            answer = answer(request, self)
        if answer is None:
            self.close_connection = True
            return
        status, more, content = answer
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        for name, value in {**more, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        with suppress(ConnectionError):  # The client has hung up.
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def answered(request: Received, _: Handler) -> Answer:
    """Answer as `core-rerank serve` does."""
    documents = request.body["documents"]
    if request.path == "/v1/documents":
        return 200, {}, {"cached": len(documents), "bytes_written": 10 * len(documents)}
    words = set(request.body["query"].lower().split())
    scores = [len(words & set(document.lower().split())) / 10 for document in documents]
    best = sorted(range(len(documents)), key=lambda index: -scores[index])
    results = [result(index, scores[index]) for index in best[: request.body.get("top_n")]]
    return 200, {}, reply(results)


def result(index: int, score: float | None, **details: Any) -> dict[str, Any]:
    details = {"probability": score, "reranked": True, "best_passage": None, **details}
    return {
        "index": index,
        "relevance_score": score or 0.0,
        "core_rerank": {"score": score, **details},
    }


def reply(results: list[dict[str, Any]], answerability: float | None = 0.75) -> dict[str, Any]:
    return {
        "id": "rerank-1",
        "model": "smollm2-135m",
        "object": "list",
        "usage": {"total_tokens": 12},
        "meta": {},
        "results": results,
        "core_rerank": {
            "answerability": answerability,
            "answerable": True,
            "heads": "fit",
            "version": "0.1.0",
        },
    }


@contextmanager
def canned_server() -> Iterator[CannedServer]:
    class Own(Handler):
        pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Own) as server:
        server.daemon_threads = True
        Own.canned = CannedServer(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield Own.canned
        finally:
            server.shutdown()
