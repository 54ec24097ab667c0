"""Answers of a real endpoint, and errors of endpoints that are down or stop early."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from core_rerank_integrations import CoReReranker
from core_rerank_integrations.chat.conversation import (
    MAX_QUESTION_CHARACTERS,
    UNANSWERED,
    ChatSettings,
    Turn,
    answer,
)
from core_rerank_integrations.chat.generators import EXTRACTS, Generator, generators
from core_rerank_integrations.chat.knowledge import KnowledgeBase
from core_rerank_integrations.errors import GeneratorError, InvalidInputError
from core_rerank_integrations.models.local_model import LocalModel

QUESTION = "When does the last ferry go?"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def endpoint(smollm2: LocalModel) -> Iterator[Generator]:
    # Transformers serves the embedded model with the OpenAI API.
    port, name = free_port(), str(smollm2.path)
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", name]
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    )
    try:
        for _ in range(120):
            try:
                urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except URLError:
                assert server.poll() is None
                time.sleep(1)
        yield generators(f"http://127.0.0.1:{port}/v1", name)[0]
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def ferries(knowledge: KnowledgeBase, tmp_path: Path) -> KnowledgeBase:
    path = tmp_path / "ferries.md"
    path.write_text("# Ferries\n\nThe last ferry goes at 18:40. Bread is baked from flour.")
    list(knowledge.add_file(path))
    return knowledge


def ask(
    knowledge: KnowledgeBase, reranker: CoReReranker, generator: Generator, question: str = QUESTION
) -> Turn:
    settings = ChatSettings(generator, abstain=False)
    *_, turn = answer(question, [], knowledge, reranker, settings)
    assert turn.is_done
    return turn


@pytest.mark.commands
def test_endpoint_streams_its_answer(
    ferries: KnowledgeBase, chat_reranker: CoReReranker, endpoint: Generator
) -> None:
    settings = ChatSettings(endpoint, abstain=False)
    turns = answer(QUESTION, [], ferries, chat_reranker, settings)
    answers = [turn.answer for turn in turns]
    assert len(set(answers)) > 5
    assert "ferry" in answers[-1]

    turn = ask(ferries, chat_reranker, endpoint)
    assert turn.error == ""
    earlier = [turn]
    *_, second = answer("and in winter?", earlier, ferries, chat_reranker, settings)
    assert second.error == ""
    assert second.search


def test_endpoint_without_the_model(
    ferries: KnowledgeBase, chat_reranker: CoReReranker, endpoint: Generator
) -> None:
    url = endpoint.name.partition(" at ")[2]
    turn = ask(ferries, chat_reranker, generators(url, "another-model")[0])
    assert turn.error.startswith(f"another-model at {url} did not answer, or stopped early")


def test_endpoint_that_is_down(ferries: KnowledgeBase, chat_reranker: CoReReranker) -> None:
    down = generators(f"http://127.0.0.1:{free_port()}/v1", "m")[0]
    turn = ask(ferries, chat_reranker, down)
    assert "did not answer, or stopped early (Connection error.)" in turn.error
    assert "choose another generator under Settings" in turn.error
    assert turn.documents, "the candidates are shown all the same"
    _, message = turn.messages()
    assert message.text == UNANSWERED
    settings = ChatSettings(down, abstain=False)
    *_, second = answer("And in winter?", [turn], ferries, chat_reranker, settings)
    assert second.search == f"{QUESTION} And in winter?"
    assert second.documents


def test_follow_up_to_an_endpoint_that_is_down(
    ferries: KnowledgeBase, chat_reranker: CoReReranker
) -> None:
    """The endpoint cannot even rewrite the question."""
    before = ask(ferries, chat_reranker, EXTRACTS)
    down = generators(f"http://127.0.0.1:{free_port()}/v1", "m")[0]
    settings = ChatSettings(down, abstain=False)
    *_, turn = answer("And in winter?", [before], ferries, chat_reranker, settings)
    assert "did not answer" in turn.error
    assert turn.search == f"{QUESTION} And in winter?"
    assert turn.reranked
    assert turn.documents
    assert turn.answer == ""
    assert turn.is_done


class DyingEndpoint(BaseHTTPRequestHandler):
    """Send a word, and close the connection before the end of the announced answer."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        piece = b'data: {"choices": [{"index": 0, "delta": {"content": "The last"}}]}\n\n'
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.close_connection = True


@contextmanager
def served(handler: type[BaseHTTPRequestHandler]) -> Iterator[Generator]:
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield generators(f"http://127.0.0.1:{server.server_port}/v1", "m")[0]
        server.shutdown()


def test_endpoint_that_dies_during_its_answer(
    ferries: KnowledgeBase, chat_reranker: CoReReranker
) -> None:
    with served(DyingEndpoint) as dying:
        turn = ask(ferries, chat_reranker, dying)
    assert turn.answer == "The last"
    assert "stopped early" in turn.error


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("text/html", b"<html>A page</html>"),
        ("application/json", b"{}"),
        ("text/event-stream", b"data: {not JSON}\n\n"),
        ("text/event-stream", b"data: [1]\n\n"),
        ("text/event-stream", b'data: {"x": 1}\n\ndata: [DONE]\n\n'),
    ],
)
def test_endpoint_that_is_not_one(
    ferries: KnowledgeBase, chat_reranker: CoReReranker, kind: str, body: bytes
) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with served(Other) as other:
        turn = ask(ferries, chat_reranker, other)
    assert turn.is_done
    assert "Check that it runs and serves that model" in turn.error
    assert turn.documents


def test_embedded_model_answers(ferries: KnowledgeBase, chat_reranker: CoReReranker) -> None:
    _, embedded = generators()
    turn = ask(ferries, chat_reranker, embedded)
    assert turn.error == ""
    assert turn.answer.strip()


def test_errors_of_questions_that_cannot_be_answered(
    knowledge: KnowledgeBase, ferries: KnowledgeBase, chat_reranker: CoReReranker
) -> None:
    assert ask(ferries, chat_reranker, EXTRACTS).answer == "The last ferry goes at 18:40. [1]"
    empty = ask(ferries, chat_reranker, EXTRACTS, "  ")
    assert "question is empty" in empty.error
    assert empty.messages() == []
    long = "x" * (MAX_QUESTION_CHARACTERS + 1)
    assert "has 2,001 characters" in ask(ferries, chat_reranker, EXTRACTS, long).error
    knowledge.remove("ferries.md")
    assert "no documents to answer from" in ask(ferries, chat_reranker, EXTRACTS).error


def test_unforeseen_errors_end_a_turn(ferries: KnowledgeBase, chat_reranker: CoReReranker) -> None:
    def load() -> None:
        raise ZeroDivisionError("by zero")

    turn = ask(ferries, chat_reranker, Generator("broken", "", load))
    assert "ZeroDivisionError" in turn.error
    assert "Traceback" not in turn.error


def test_key_comes_from_the_environment_and_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    generator = generators("http://127.0.0.1:1/v1", "keyed")[0]
    model = generator.load()
    assert model.openai_api_key.get_secret_value() == "sk-secret"
    assert "sk-secret" not in repr(model) + repr(generator)
    with pytest.raises(GeneratorError) as caught, generator.clear_errors():
        list(model.stream("hi"))
    assert "sk-secret" not in str(caught.value)


def test_incomplete_endpoint_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="takes a URL and a model's name"):
        generators("http://localhost:8000/v1", None)
    with pytest.raises(InvalidInputError, match="must begin with http"):
        generators("localhost:8000", "m")
