"""Requests that the page does not send are refused, before anything reads them."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient
from support.cli import failed

from core_rerank_integrations import CoReReranker
from core_rerank_integrations.chat.app import build_app
from core_rerank_integrations.chat.generators import generators
from core_rerank_integrations.chat.knowledge import KnowledgeBase
from core_rerank_integrations.chat.server import (
    ABANDONED_SECONDS,
    FIRST_PORT,
    MAX_JSON_BYTES,
    MAX_UPLOAD_BYTES,
    MAX_WAITING_BYTES,
    Guard,
    listen,
)
from core_rerank_integrations.errors import InvalidInputError

OWN = "http://127.0.0.1:7860"
API = "/gradio_api"
NAME = "chat.example.org"


@pytest.fixture(scope="module")
def knowledge(
    tmp_path_factory: pytest.TempPathFactory, chat_reranker: CoReReranker
) -> Iterator[KnowledgeBase]:
    knowledge = KnowledgeBase(tmp_path_factory.mktemp("server") / "data", chat_reranker)
    path = tmp_path_factory.mktemp("files") / "rules.md"
    path.write_text("Dogs may come.")
    list(knowledge.add_file(path))
    yield knowledge
    knowledge.close()


@pytest.fixture(scope="module")
def app(knowledge: KnowledgeBase, chat_reranker: CoReReranker) -> Guard:
    return build_app(knowledge, chat_reranker, generators(), "127.0.0.1", [NAME])


@pytest.fixture(scope="module")
def client(app: Guard) -> Iterator[TestClient]:
    with TestClient(app, base_url=OWN) as client:
        yield client


def event(client: TestClient, trigger: str, target: str) -> int:
    """Return the index of an event, by what triggers it and a part of its target's text."""
    config = client.get("/config").json()
    texts = {item["id"]: str(item["props"]) for item in config["components"]}
    return next(
        item["id"]
        for item in config["dependencies"]
        if any(target in texts.get(id_, "") and name == trigger for id_, name in item["targets"])
    )


def upload(client: TestClient, **headers: str) -> httpx.Response:
    return client.post(f"{API}/upload", files={"files": ("a.txt", b"text")}, headers=headers)


def test_page_forbids_frames_and_other_servers(client: TestClient) -> None:
    response = client.get("/")
    assert response.status_code == 200
    assert response.headers["x-frame-options"] == "DENY"
    assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
    assert "default-src 'self'" in response.headers["content-security-policy"]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "10.0.0.1", "", "]["]
)
def test_other_names_of_this_machine_read_and_remove_nothing(
    client: TestClient, knowledge: KnowledgeBase, host: str
) -> None:
    headers = {"host": host}
    page = client.get("/", headers=headers)
    assert page.status_code == 421
    assert "--allowed-host" in page.text
    remove = {
        "data": [["rules.md"]],
        "fn_index": event(client, "click", "Remove selected documents"),
        "session_hash": "s",
    }
    assert client.post(f"{API}/queue/join", json=remove, headers=headers).status_code == 421
    assert client.get(f"{API}/queue/data?session_hash=s", headers=headers).status_code == 421
    assert upload(client, **headers).status_code == 421
    assert list(knowledge.sources) == ["rules.md"]
    assert not [path for path in knowledge.uploads.rglob("*") if path.is_file()]


@pytest.mark.parametrize("host", ["localhost:1", "[::1]:7860", "LOCALHOST", NAME, f"{NAME}.:80"])
def test_names_of_the_server(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"host": host}).status_code == 200


def test_addresses_are_names_of_a_server_that_others_reach(
    app: Guard, knowledge: KnowledgeBase
) -> None:
    client = TestClient(Guard(app, host="0.0.0.0", uploads=knowledge.uploads))
    for host in ("192.168.1.7:7860", "[fe80::1]"):
        # The inner guard, for 127.0.0.1, refuses it.
        assert "has no name" in client.get("/", headers={"host": host}).text
    open_app = Guard(app._app, host="0.0.0.0", uploads=knowledge.uploads)
    client = TestClient(open_app)
    assert client.get("/", headers={"host": "192.168.1.7:7860"}).status_code == 200
    assert client.get("/", headers={"host": "[fe80::1]"}).status_code == 200
    assert client.get("/", headers={"host": "evil.example"}).status_code == 421


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:3000"},
        {"origin": "http://localhost:7860"},
        {"origin": "http://[", "sec-fetch-site": "none"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site", "sec-fetch-dest": "image"},
    ],
)
def test_pages_of_other_sites_are_refused(client: TestClient, headers: dict[str, str]) -> None:
    assert upload(client, **headers).status_code == 403
    assert client.post(f"{API}/queue/join", json={}, headers=headers).status_code == 403
    assert client.get("/config", headers=headers).status_code == 403


def test_the_page_itself_and_its_proxy_are_served(client: TestClient) -> None:
    for origin in (OWN, f"https://{NAME}"):
        headers = {"origin": origin, "sec-fetch-site": "same-origin"}
        assert client.post(f"{API}/queue/join", json={}, headers=headers).status_code == 422
    link = {"sec-fetch-site": "cross-site", "sec-fetch-dest": "document"}
    assert client.get("/", headers=link).status_code == 200
    frame = {"sec-fetch-site": "cross-site", "sec-fetch-dest": "iframe"}
    assert client.get("/", headers=frame).status_code == 403


def test_bodies_are_bounded(client: TestClient) -> None:
    large = b'{"data": ["' + b"x" * MAX_JSON_BYTES + b'"]}'
    join = f"{API}/queue/join"
    assert client.post(join, content=large).status_code == 413
    pieces = (large[start : start + 65536] for start in range(0, len(large), 65536))
    assert client.post(join, content=pieces).status_code == 413, "its length is not announced"
    for length in (str(MAX_UPLOAD_BYTES + 1), "many"):
        assert upload(client, **{"content-length": length}).status_code == 413
    assert client.request("GET", "/", content=b"x").status_code == 413


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", f"{API}/deep_link?session_hash=s"),
        ("GET", f"{API}/proxy=https://example.org"),
        ("GET", f"{API}/file=/etc/hostname"),
        ("GET", f"{API}/runs"),
        ("GET", "/monitoring"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("POST", f"{API}/run/predict"),
        ("POST", f"{API}/process_recording"),
        ("POST", "/login"),
        ("DELETE", "/"),
    ],
)
def test_routes_that_the_page_does_not_use_are_closed(
    client: TestClient, method: str, path: str
) -> None:
    assert client.request(method, path).status_code == 404


def test_uploads_are_private_few_and_do_not_stay(
    client: TestClient, knowledge: KnowledgeBase
) -> None:
    abandoned = knowledge.uploads / "abandoned"
    abandoned.write_text("x")
    old = time.time() - ABANDONED_SECONDS - 1
    os.utime(abandoned, (old, old))
    (path,) = upload(client).json()
    assert not abandoned.exists()
    assert Path(path).read_text() == "text"
    assert Path(path).is_relative_to(knowledge.uploads)
    assert stat.S_IMODE(knowledge.uploads.stat().st_mode) == 0o700

    with Path(path).open("wb") as file:
        file.truncate(MAX_WAITING_BYTES + 1)
    assert upload(client).status_code == 429
    Path(path).unlink()


@pytest.mark.parametrize("name", ["../../x.txt", "/etc/x.txt", "<img src=x onerror=a()>.txt"])
def test_names_of_uploads_are_not_paths(
    client: TestClient, knowledge: KnowledgeBase, name: str
) -> None:
    (path,) = client.post(f"{API}/upload", files={"files": (name, b"text")}).json()
    assert Path(path).resolve().is_relative_to(knowledge.uploads.resolve())
    Path(path).unlink()


@pytest.mark.parametrize(
    "path", ["/etc/hostname", "{uploads}/../documents", "https://example.org/x.txt", "\0", None, 1]
)
def test_requests_name_no_files_but_uploads(
    client: TestClient, knowledge: KnowledgeBase, path: object
) -> None:
    if isinstance(path, str):
        path = path.replace("{uploads}", str(knowledge.uploads))
    file = {"path": path, "orig_name": "x.txt", "meta": {"_type": "gradio.FileData"}}
    for data in ([[file]], [{"question": file}]):
        join = {"data": data, "fn_index": 0, "session_hash": "s"}
        assert client.post(f"{API}/queue/join", json=join).status_code == 403


def test_body_that_is_not_json(client: TestClient) -> None:
    for body in (b"", b"{", b"[" * 100_000, b"\xff"):
        assert client.post(f"{API}/queue/join", content=body).status_code == 400


def test_port_in_use_is_named_before_anything_is_loaded() -> None:
    with listen("127.0.0.1", None) as first, listen("127.0.0.1", None) as second:
        ports = [listener.getsockname()[1] for listener in (first, second)]
        assert FIRST_PORT <= ports[0] < ports[1]
        with pytest.raises(InvalidInputError, match=rf"cannot listen on 127\.0\.0\.1:{ports[0]}"):
            listen("127.0.0.1", ports[0])
        output = failed("chat", "--port", str(ports[0]), "--model", "absent", "--no-open")
        assert f"cannot listen on 127.0.0.1:{ports[0]}" in output
        assert "--port" in output
    with pytest.raises(InvalidInputError, match=r"cannot listen on absent\.invalid:1"):
        listen("absent.invalid", 1)
    if socket.has_ipv6:
        listen("[::1]", None).close()


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_interrupt_ends_the_server_while_pages_are_open() -> None:
    code = (
        "import asyncio, sys\n"
        "from core_rerank_integrations.chat.server import listen, serve\n"
        "async def app(scope, receive, send):\n"
        "    if scope['type'] == 'http': await asyncio.sleep(600)\n"
        "    await receive()\n"
        "    await send({'type': 'lifespan.startup.complete'})\n"
        "serve(app, listen('127.0.0.1', None), opens=False)"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline().split()[1].rpartition(b":")[2])
        with socket.create_connection(("127.0.0.1", port)) as page:
            page.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            time.sleep(1)
            server.send_signal(signal.SIGINT)
            _, errors = server.communicate(timeout=60)
    assert errors == b""
    assert server.returncode == 0


def test_folder_in_use_is_named_before_the_model_is_loaded(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, time\n"
        "from core_rerank_integrations.chat.knowledge import lock_folder\n"
        "lock = lock_folder(pathlib.Path(sys.argv[1])); print(flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        output = failed("chat", "--data", str(tmp_path), "--model", "absent", "--no-open")
        other.kill()
    assert "are in use by another process" in output


def test_missing_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['gradio'] = None\n"
        "from core_rerank_integrations.cli import app; app()"
    )
    command = [sys.executable, "-c", code, "chat", "--no-open"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert 'pip install "core-rerank-integrations[chat]"' in result.stderr
    assert "Traceback" not in result.stderr
