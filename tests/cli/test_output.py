"""What commands print: complete, in any encoding, and never read as markup."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import pytest
from rich.text import Text
from support.cli import failed, run
from typer.testing import CliRunner

from core_rerank_integrations import CoReReranker
from core_rerank_integrations.cli import commands
from core_rerank_integrations.cli.common import print_table

rerank = import_module("core_rerank_integrations.cli.rerank")
QUERY = ("rerank", "--query", "Who patented the telephone?", "--documents", "-")
MARKUP = "[chat] [bold]x[/bold] [/x] :smile: https://example.org/[a]"
CODE = "from core_rerank_integrations.cli import app; app()"
LONG = f"{'Bell ' * 40}/a/path/[chat]/to/[/x]"


class Terminal:
    """A terminal of 80 columns."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.written = ""

    def write(self, text: str) -> int:
        self.written += text
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("text", [MARKUP, Text(MARKUP)])
def test_text_of_users_is_never_markup(text: str | Text, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    print_table((MARKUP, "b"), [(text, "1")], title=MARKUP)
    assert terminal.written.count(MARKUP) == 3


def test_a_pipe_gets_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("a", "b"), [("1", Text(LONG)), ("two\nlines", "x\ty")], title="Title")
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["Title", "a\tb", f"1\t{LONG}", "two lines\tx y"]
    model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert f"fit-smollm2-135m-instruct\t{model}\t" in run("heads", "list")
    assert f"\t{model}\t" in run("models", "list")


@pytest.mark.parametrize(
    "arguments",
    [
        ("rerank", "--query", "q", "--documents", "PATH"),
        ("chat", "--files", "PATH"),
        ("PATH",),
        ("heads", "find", "--data", "d:s:r", "--output", "PATH/"),
    ],
)
def test_paths_in_errors_are_whole(arguments: tuple[str, ...], tmp_path: Path) -> None:
    path = str(tmp_path / f"{'long' * 20}/[chat]/[/x]" / "file name.pdf")
    Path(path).mkdir(parents=True)
    arguments = tuple(argument.replace("PATH", path) for argument in arguments)
    result = CliRunner().invoke(commands.app, list(arguments))
    assert result.exit_code in {1, 2}
    assert path in result.stderr, "neither wrapped nor taken for markup"
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("command", "module", "extra"), [("demo", "bm25s", "examples"), ("chat", "gradio", "chat")]
)
def test_hints_keep_the_extra(
    command: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for name in [name for name in sys.modules if name.startswith("core_rerank_integrations.c")]:
        if name.split(".")[1:2] == ["chat"] or name.endswith("cli.demo"):
            monkeypatch.delitem(sys.modules, name)
    assert f'pip install "core-rerank-integrations[{extra}]"' in failed(command)


def test_help_is_complete_at_any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    for command in (("rerank",), ("cache",), ("evaluate",), ("heads", "fit"), ("heads", "find")):
        text = run(*command, "--help")
        assert "…" not in text
        assert not [line for line in text.splitlines() if line.endswith("...")]
    assert "FOLDER:SPLIT:RUN[:N]" in "".join(run("heads", "find", "--help").split())


@pytest.fixture
def loaded(calibrated: CoReReranker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command use the reranker that other tests have loaded."""
    monkeypatch.setattr(rerank, "CoReReranker", lambda **_: nullcontext(calibrated))


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii", "utf-16"])
@pytest.mark.parametrize("output", ["text", "json", "trec"])
def test_any_encoding_of_the_output(encoding: str, output: str) -> None:
    text = "Bell ✔ 電話 é \U0001f600 in 1876."
    typed = json.dumps([{"text": text, "id": "電"}, {"text": "lone \ud800", "id": "b"}])
    runner = CliRunner(charset=encoding)
    result = runner.invoke(commands.app, [*QUERY, "--output", output], input=typed)
    assert result.exit_code == 0, result.output
    printed = result.stdout_bytes.decode(encoding)
    if output == "json":
        assert {row["document"] for row in json.loads(printed)} == {text, "lone \ud800"}
    elif encoding.startswith("utf"):
        assert "電" in printed


@pytest.mark.usefixtures("loaded")
def test_control_characters_of_documents_do_not_reach_the_terminal() -> None:
    printed = run(*QUERY, typed=json.dumps(["a\x1b[31m red\x07 \x9b b", "c"]))
    assert not set(printed) & {"\x1b", "\x07", "\x9b"}
    printed = run(*QUERY, "--output", "json", typed=json.dumps(["a\x1b[31m"]))
    assert json.loads(printed)[0]["document"] == "a\x1b[31m"


def test_ids_that_trec_cannot_hold_are_refused() -> None:
    typed = json.dumps([{"id": "two words", "text": "a"}])
    assert "the id 'two words' cannot be written as TREC" in failed(
        *QUERY, "--output", "trec", typed=typed
    )
    assert "the id '' cannot" in failed(*QUERY, "--output", "trec", "--query-id", "", typed="a")


def test_a_query_is_checked_before_a_model_is_found() -> None:
    for query in ("", " \n\t"):
        arguments = ("--query", query, "--documents", "-", "--model", "nowhere/missing")
        assert "the query is empty" in failed("rerank", *arguments, typed="a")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell and /dev/full")
@pytest.mark.parametrize(
    ("redirected", "arguments", "exit_code", "message"),
    [
        (">/dev/full", "heads list", 1, "error: [Errno 28] No space left on device"),
        (">&-", "heads list", 0, ""),
        (
            "<&-",
            "rerank --query q --documents -",
            1,
            "error: cannot read documents from -: standard",
        ),
    ],
)
def test_closed_and_full_streams(
    redirected: str, arguments: str, exit_code: int, message: str
) -> None:
    shell = f"exec '{sys.executable}' -c '{CODE}' {arguments} {redirected}"
    result = subprocess.run(["sh", "-c", shell], capture_output=True, text=True)
    assert result.returncode == exit_code
    assert result.stderr.startswith(message)
    assert len(result.stderr.splitlines()) == bool(message)


@pytest.mark.usefixtures("smollm2")
def test_warnings_of_commands_are_one_line() -> None:
    command = [sys.executable, "-c", CODE, *QUERY, "--max-document-tokens", "2"]
    result = subprocess.run(command, input=b"Bread is baked.", capture_output=True, timeout=120)
    assert result.returncode == 0
    (warning,) = [line for line in result.stderr.splitlines() if b"was cut" in line]
    assert warning.startswith(b"warning: document 0 was cut to 2 tokens")
    assert b".py" not in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGINT for a process")
def test_an_interrupt_ends_without_a_traceback() -> None:
    code = CODE.replace("; ", "; print(flush=True); ")
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", code, *QUERY], stdin=pipe, stdout=pipe, stderr=pipe
    ) as process:
        assert process.stdout
        process.stdout.readline()
        time.sleep(1)  # It now waits for documents, or still imports modules.
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert b"Traceback" not in errors


def test_an_interrupt_that_an_import_loses_ends_the_command() -> None:
    """Pydantic, for one, wraps it in an error of its own."""
    code = """
import signal, sys

class Finder:
    def find_spec(self, name, *_):
        if name == "core_rerank_integrations.cli.commands":
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                pass

sys.meta_path.insert(0, Finder())
"""
    result = subprocess.run(
        [sys.executable, "-c", code + CODE, "--version"], capture_output=True, timeout=60
    )
    assert (result.returncode, result.stdout, result.stderr) == (130, b"", b"")


def test_a_reader_that_leaves_ends_the_command_silently() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CODE, "heads", "list"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout
        process.stdout.close()
        assert process.stderr
        assert process.stderr.read() == b""
    assert process.returncode == 1
