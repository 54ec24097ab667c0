"""Measure the cost of installing and importing the package; `make bench-package`.

Builds the wheels and prints their sizes, starts Python with and without an import, and with
`--environment` installs `[cpu,langchain]` into a clean environment and measures that.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from common import alternate, machine

ROOT = Path(__file__).parents[1]
IMPORTS = (
    "import core_rerank_integrations",
    "from core_rerank_integrations import CoReReranker",
)


def build_wheels(folder: Path) -> list[Path]:
    for source in (ROOT, *sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))):
        command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(source)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return sorted(folder.glob("*.whl"))


def environment_size(folder: Path, requirement: str) -> tuple[float, float]:
    """Return the MB of a clean environment before and after ``requirement`` is installed."""

    def size() -> float:
        return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6

    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    empty = size()
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--quiet"]
    constraints = ROOT / "constraints.txt"
    subprocess.run([*pip, "install", "-c", str(constraints), requirement], check=True)
    return empty, size()


def import_seconds(statement: str, rounds: int) -> tuple[float, float]:
    """Return the median wall seconds of Python's start, plain and with ``statement``."""

    def start(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], check=True)

    plain, importing = alternate(lambda _: start("pass"), lambda _: start(statement), rounds)
    return statistics.median(plain), statistics.median(importing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--environment", action="store_true")
    arguments = parser.parse_args()
    print(machine("numpy", "pydantic", "openvino", "transformers", "langchain-core"))
    with TemporaryDirectory() as folder:
        wheels = build_wheels(Path(folder))
        print("\n| wheel | kB |\n| --- | --- |")
        for wheel in wheels:
            print(f"| `{wheel.name.split('-')[0]}` | {wheel.stat().st_size / 1e3:.0f} |")
        if arguments.environment:
            (main_wheel,) = (
                wheel for wheel in wheels if wheel.name.startswith("core_rerank_integrations")
            )
            requirement = f"core-rerank-integrations[cpu,langchain] @ {main_wheel.as_uri()}"
            empty, full = environment_size(Path(folder) / "venv", requirement)
            print("\n| clean environment | MB |\n| --- | --- |")
            print(f"| empty | {empty:.0f} |\n| `[cpu,langchain]` | {full:.0f} |")
    print("\n| import | with it, s | plain Python, s | over it, s |\n| --- | --- | --- | --- |")
    for statement in IMPORTS:
        plain, importing = import_seconds(statement, arguments.rounds)
        print(f"| `{statement}` | {importing:.3f} | {plain:.3f} | **{importing - plain:.3f}** |")


if __name__ == "__main__":
    main()
