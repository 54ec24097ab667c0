"""``core-rerank serve`` as a process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from support.cli import failed

COMMAND = str(Path(sys.executable).with_name("core-rerank"))


@contextmanager
def started(*arguments: str, **variables: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [COMMAND, "serve", "--port", str(port), *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | variables,
    )
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.commands
@pytest.mark.model
def test_serve_with_a_key_and_end_by_a_signal(tmp_path: Path) -> None:
    headers = {"authorization": "Bearer s3cret"}
    body = {"query": "Who patented it?", "documents": ["Bread.", "Bell patented the telephone."]}
    options = ("--api-key-env", "MY_KEY", "--folder", str(tmp_path))
    with started(*options, MY_KEY="s3cret") as (url, process):
        end = time.monotonic() + 300
        while time.monotonic() < end and process.poll() is None:
            try:
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            except httpx.ConnectError:
                pass
            time.sleep(0.1)
        assert httpx.post(f"{url}/rerank", json=body).status_code == 401
        reply = httpx.post(f"{url}/rerank", json=body, headers=headers, timeout=60)
        assert reply.json()["results"][0]["index"] == 1
        texts = {"documents": body["documents"]}
        httpx.post(f"{url}/v1/documents", json=texts, headers=headers, timeout=60)
        assert list(tmp_path.rglob("*")), "documents are cached in the folder"
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert url in errors
    assert "is ready" in errors
    assert "s3cret" not in errors
    assert "Bell" not in errors
    assert "Traceback" not in errors


@pytest.mark.commands
def test_a_model_that_cannot_be_loaded_ends_the_command(tmp_path: Path) -> None:
    with started("--model", str(tmp_path)) as (_, process):
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "error:" in errors
    assert str(tmp_path) in errors
    assert "Traceback" not in errors


def test_a_key_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    assert "NO_KEY" in failed("serve", "--api-key-env", "NO_KEY")
    monkeypatch.setenv("NO_KEY", " spaces ")
    assert "NO_KEY" in failed("serve", "--api-key-env", "NO_KEY")


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1:{port}" in failed("serve", "--port", port)


def test_the_cache_has_options_which_vllm_refuses(tmp_path: Path) -> None:
    assert "disk_bytes" in failed("serve", "--disk-bytes", "-1")
    folder = ("--folder", str(tmp_path), "--disk-bytes", "1000000")
    assert "document_cache is not for 'vllm'" in failed("serve", "--backend", "vllm", *folder)


def test_arguments_of_vllm_that_would_replace_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "s3cret")
    command = ("serve", "--backend", "vllm-shared", "--api-key-env", "MY_KEY", "--")
    assert "two keys" in failed(*command, "--api-key", "another")


@pytest.mark.parametrize(
    "arguments",
    [("--api-key", "s3cret", "s3cret-2"), ("--api_key=s3cret",), ("--hf-tok", "s3cret")],
    ids=" ".join,
)
def test_keys_and_tokens_for_vllm_are_not_shown(arguments: tuple[str, ...]) -> None:
    message = failed("serve", "--", *arguments, "--enforce-eager", "x")
    assert "... --enforce-eager x: arguments after --" in message.replace("=...", " ...")
    assert "s3cret" not in message


def test_limits_are_options() -> None:
    assert "max_documents" in failed("serve", "--max-documents", "0")
