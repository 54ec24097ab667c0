"""Nothing leaves the machine: which names are looked up, and what is written at home."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from core_rerank_integrations.models.local_model import LocalModel, cache_folder

ROOT = Path(__file__).parents[2]
COMMAND = str(Path(sys.executable).with_name("core-rerank"))
WATCH = """
import os, sys

def hook(event, arguments):
    if event == "socket.getaddrinfo":
        address = arguments[0]
    elif event in ("socket.gethostbyname", "socket.gethostbyaddr"):
        address = arguments[0]
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        address = address[0] if isinstance(address, tuple) else None  # Else a Unix socket.
    else:
        return
    if isinstance(address, bytes):
        address = address.decode()
    if address not in (None, "", "localhost", "0.0.0.0", "::", "::1", "127.0.0.1"):
        with open(os.environ["ASKED"], "a") as file:
            print(address, *sys.argv, file=file)

sys.addaudithook(hook)
"""
"""A hook in this process and all of its Python children."""

Environment = dict[str, str]


@pytest.fixture
def environment(smollm2: LocalModel, tmp_path: Path) -> Environment:
    """Return an environment of a new user, without variables that switch something off."""
    assert smollm2.path.parent == cache_folder()
    for folder in ("home", "cache", "watch"):
        (tmp_path / folder).mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(WATCH)
    (tmp_path / "cache" / "models").symlink_to(cache_folder())
    kept = ("PATH", "SYSTEMROOT", "LANG", "OMP_NUM_THREADS")
    return {name: os.environ[name] for name in kept if name in os.environ} | {
        "HOME": str(tmp_path / "home"),
        "CORE_RERANK_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(tmp_path / "watch"),
        "ASKED": str(tmp_path / "asked"),
    }


@pytest.fixture
def assert_private(environment: Environment) -> Callable[[], None]:
    """Return a function that checks what was looked up and written."""

    def check() -> None:
        asked = Path(environment["ASKED"])
        assert not asked.exists(), asked.read_text()
        home = Path(environment["HOME"])
        assert {path.name for path in home.iterdir()} <= {".cache", ".config", ".local"}

    return check


def run(environment: Environment, *command: str) -> str:
    result = subprocess.run(
        command, env=environment, cwd=environment["HOME"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def snippet() -> str:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0]


def test_the_watch_sees_children(environment: Environment) -> None:
    ask = "import socket\ntry: socket.getaddrinfo('example.invalid', 80)\nexcept OSError: pass"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ask!r}])"
    run(environment, sys.executable, "-c", code)
    assert Path(environment["ASKED"]).read_text().startswith("example.invalid")


def test_the_first_snippet_asks_nobody(
    environment: Environment, assert_private: Callable[[], None]
) -> None:
    assert "Canberra" in run(environment, sys.executable, "-c", snippet())
    assert_private()


def test_the_command_asks_nobody(
    environment: Environment, assert_private: Callable[[], None]
) -> None:
    documents = Path(environment["HOME"], ".cache", "documents.txt")
    documents.parent.mkdir()
    documents.write_text("Bread is baked.\nBell patented the telephone.\n")
    command = (COMMAND, "rerank", "--query", "who patented the telephone?", "--documents")
    assert "Bell" in run(environment, *command, str(documents), "--top-n", "1")
    assert_private()


def test_a_program_that_imported_openvino_before_keeps_its_telemetry() -> None:
    code = (
        "import sys, types\n"
        "own = sys.modules['openvino_telemetry'] = types.ModuleType('openvino_telemetry')\n"
        "import core_rerank_integrations.backends.openvino.runtime\n"
        "assert sys.modules['openvino_telemetry'] is own\n"
        "del sys.modules['openvino_telemetry']\n"
        "import openvino_telemetry\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "CI": "1"})


@pytest.mark.slow
def test_the_demo_asks_nobody(environment: Environment, assert_private: Callable[[], None]) -> None:
    assert "nDCG" in run(environment, COMMAND, "demo")
    assert_private()


@pytest.mark.slow
def test_the_chatbot_asks_nobody_when_it_starts(
    environment: Environment, assert_private: Callable[[], None]
) -> None:
    process = subprocess.Popen(
        [COMMAND, "chat", "--no-open"],
        env=environment,
        cwd=environment["HOME"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        assert "in a browser" in process.stdout.readline()
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert_private()
