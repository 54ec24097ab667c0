"""The built wheels in clean environments: the main one alone, and the thin ones with it."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from email import message_from_bytes
from pathlib import Path

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


@pytest.mark.usefixtures("smollm2")  # Without PyTorch its GGUF file cannot be converted.
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
