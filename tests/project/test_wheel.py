"""The built wheels in clean environments: the main one alone, and the thin ones with it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email import message_from_bytes
from pathlib import Path
from typing import Any

import pytest

from core_rerank_integrations import __version__

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
MAIN = "core_rerank_integrations"

Environment = Callable[..., Callable[[str], str]]


def first_example(readme: Path) -> str:
    """Return the first Python block of a README."""
    return re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)[0]


@dataclass(frozen=True)
class ThinPackage:
    """The names of one framework in the main package."""

    project: str
    module: str
    extra: str
    other_framework: str

    @property
    def folder(self) -> Path:
        return ROOT / "packages" / self.project

    @property
    def wheel_name(self) -> str:
        return self.project.replace("-", "_")

    def example(self) -> str:
        """Return the first block of the README, which prints the better of two documents."""
        return first_example(self.folder / "README.md")


LANGCHAIN = ThinPackage(
    "langchain-core-rerank", "langchain_core_rerank", "langchain", "llama_index"
)
LLAMA_INDEX = ThinPackage(
    "llama-index-postprocessor-core-rerank",
    "llama_index.postprocessor.core_rerank",
    "llama-index",
    "langchain_core",
)
THIN = pytest.mark.parametrize("thin", [LANGCHAIN, LLAMA_INDEX], ids=lambda thin: thin.extra)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build all three wheels; they are returned by the names with which their files begin."""
    folder = tmp_path_factory.mktemp("dist")
    for source in (ROOT, LANGCHAIN.folder, LLAMA_INDEX.folder):
        command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(source)]
        subprocess.run(command, check=True)
    return {path.name.split("-")[0]: path for path in folder.glob("*.whl")}


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """Return a function that makes a clean environment, and returns a function that runs code."""

    def make(*requirements: str) -> Callable[[str], str]:
        subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
        python = str(tmp_path / "venv" / "bin" / "python")
        # The constraints keep pip from a CUDA build of torch.
        install = [python, "-m", "pip", "install", "-c", str(ROOT / "constraints.txt")]
        subprocess.run([*install, *requirements], check=True)

        def run(code: str) -> str:
            # -E ignores PYTHONPATH.
            command = [python, "-E", "-c", code]
            return subprocess.run(
                command, check=True, cwd=tmp_path, stdout=subprocess.PIPE, text=True
            ).stdout

        return run

    return make


def lacks(*modules: str) -> str:
    return (
        "from importlib.util import find_spec\n"
        f"assert [name for name in {modules} if find_spec(name)] == []"
    )


def files_of(folder: str) -> set[str]:
    """Return all files in a folder of the repository, without compiled ones."""
    paths = (ROOT / folder).rglob("*")
    return {
        path.relative_to(ROOT).as_posix()
        for path in paths
        if path.is_file() and path.suffix != ".pyc"
    }


def test_contents_of_the_main_wheel(wheels: dict[str, Path]) -> None:
    """Stubs (``.pyi``) are needed at run time, because lazy imports read them."""
    names = {name for name in zipfile.ZipFile(wheels[MAIN]).namelist() if ".dist-info/" not in name}
    resources = files_of("model_configs") | files_of("examples/data")
    assert names == files_of(MAIN) | {f"{MAIN}/{name}" for name in resources}
    assert {
        f"{MAIN}/{name}"
        for name in (
            "__init__.pyi",
            "py.typed",
            "chat/style.css",
            "chat/page.html",
            "chat/citations.js",
        )
    } <= names


def test_metadata_of_the_main_wheel(wheels: dict[str, Path]) -> None:
    archive = zipfile.ZipFile(wheels[MAIN])
    about = f"{MAIN}-{__version__}.dist-info"
    metadata = message_from_bytes(archive.read(f"{about}/METADATA"))
    core = {item for item in metadata.get_all("Requires-Dist", []) if "extra ==" not in item}
    assert not [item for item in core if re.match("typer|rich|pyyaml|torch|transformers", item)]
    assert len(metadata.get_all("Project-URL", [])) == 5
    assert "core_rerank = " in archive.read(f"{about}/entry_points.txt").decode()


@THIN
def test_contents_of_a_thin_wheel(thin: ThinPackage, wheels: dict[str, Path]) -> None:
    """An ``__init__.py`` above its own module would hide the rest of the namespace."""
    archive = zipfile.ZipFile(wheels[thin.wheel_name])
    about = f"{thin.wheel_name}-{__version__}.dist-info"
    module = thin.module.replace(".", "/")
    assert set(archive.namelist()) == {
        *(f"{module}/{name}" for name in ("__init__.py", "py.typed")),
        *(f"{about}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")),
    }
    assert archive.read(f"{about}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    metadata = message_from_bytes(archive.read(f"{about}/METADATA"))
    main = f"core-rerank-integrations[cpu,{thin.extra}]>={__version__}"
    assert metadata.get_all("Requires-Dist") == [main]


@THIN
def test_one_framework(
    thin: ThinPackage, wheels: dict[str, Path], environment: Environment
) -> None:
    extras = f"transformers,{thin.extra}"
    run = environment(f"core-rerank-integrations[{extras}] @ {wheels[MAIN].as_uri()}")
    assert run(thin.example().replace(thin.module, MAIN)).startswith("Bell")
    run(lacks(thin.other_framework))


@THIN
def test_a_thin_wheel_without_pytorch(
    thin: ThinPackage, wheels: dict[str, Path], environment: Environment, tmp_path: Path
) -> None:
    run = environment(*(str(wheels[name]) for name in (thin.wheel_name, MAIN)))
    assert run(thin.example()).startswith("Bell")
    run(lacks("torch", thin.other_framework))
    assert "Canberra" in run(first_example(ROOT / "README.md"))
    if thin is LLAMA_INDEX:
        neighbour = tmp_path / "llama_index" / "postprocessor" / "neighbour"
        neighbour.mkdir(parents=True)
        (neighbour / "__init__.py").touch()
        run(
            "import llama_index.core, llama_index.postprocessor.neighbour\n"
            f"import {thin.module} as thin, {MAIN} as main\n"
            "assert thin.CoReNodePostprocessor is main.CoReNodePostprocessor\n"
        )


@dataclass(frozen=True)
class BareMachine:
    """A clean environment without pip, and an empty cache.

    Attributes:
        folder: Folder that every user can read.
    """

    folder: Path

    @property
    def python(self) -> str:
        return str(self.folder / "venv" / "bin" / "python")

    @property
    def variables(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "CORE_RERANK_CACHE": str(self.folder / "cache"),
            "HF_ENDPOINT": "http://127.0.0.1:9",
        }


@pytest.fixture(scope="module")
def bare(wheels: dict[str, Path]) -> Iterator[BareMachine]:
    # The wheel is installed from outside, and nothing may be built. Another user can run the
    # system's Python, where one of a version manager is in somebody's home.
    system = Path(f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}")
    interpreter = str(system) if system.exists() else sys.executable
    with tempfile.TemporaryDirectory() as name:
        machine = BareMachine(Path(name))
        machine.folder.chmod(0o755)
        command = [interpreter, "-m", "venv", "--without-pip", str(machine.folder / "venv")]
        subprocess.run(command, check=True)
        requirement = f"core-rerank-integrations[cpu,langchain] @ {wheels[MAIN].as_uri()}"
        pip = [sys.executable, "-m", "pip", "--python", machine.python, "install"]
        constraints = str(ROOT / "constraints.txt")
        subprocess.run([*pip, "--only-binary=:all:", "-c", constraints, requirement], check=True)
        yield machine


def first_snippet(*command: str, **options: Any) -> None:
    """Run the README's first snippet; the output must be what the README shows."""
    readme = ROOT / "README.md"
    code = lacks("pip", "torch", "accelerate") + "\n" + first_example(readme)
    result = subprocess.run([*command, code], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stderr
    assert f"```\n{result.stdout}```" in readme.read_text(encoding="utf-8")


def test_the_first_snippet_on_a_bare_machine(bare: BareMachine, tmp_path: Path) -> None:
    variables = {**bare.variables, "HOME": str(tmp_path)}
    first_snippet(bare.python, "-c", env=variables, cwd=tmp_path)
    assert list(tmp_path.glob("*")) == []
    assert [path.suffix for path in (bare.folder / "cache" / "models").iterdir()].count(".whl") == 0


def test_a_user_without_a_home_on_a_read_only_root(bare: BareMachine) -> None:
    """A container often runs like this, with the cache in its image."""
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    mount = [*sudo, "unshare", "--mount", "sh", "-c", 'mount -o remount,bind,ro / && exec "$@"']
    user = ["sh", "setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
    if subprocess.run([*mount, *user, bare.python, "-c", ""]).returncode:
        pytest.skip("no other user can run Python on a read-only root of this machine")
    if not (bare.folder / "cache").exists():
        name = "core_rerank_integrations.models.resolve"
        fetch = f"from {name} import resolve; resolve('smollm2-135m')"
        subprocess.run([bare.python, "-c", fetch], env=bare.variables, check=True)
    variables = [f"{name}={value}" for name, value in bare.variables.items()]
    first_snippet(*mount, *user, "env", "-i", *variables, bare.python, "-B", "-c", cwd="/")
