"""What an import costs, and what a missing extra says."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ["torch", "transformers", "openvino", "vllm", "langchain_core", "llama_index"]


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_imports_no_framework() -> None:
    code = (
        "import sys, core_rerank_integrations as c; c.CoReReranker; c.HeadSet; c.RerankResult\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert run(code).strip() == "[]"


@pytest.mark.parametrize(
    ("missing", "use", "extra"),
    [
        ("langchain_core", "core_rerank_integrations.CoReDocumentCompressor", "langchain"),
        ("openvino", "import core_rerank_integrations.backends.openvino.backend", "cpu"),
        ("vllm", "import core_rerank_integrations.backends.vllm.caller.dedicated", "vllm"),
        ("gradio", "import core_rerank_integrations.chat.app", "chat"),
        ("kreuzberg", "import core_rerank_integrations.chat.app", "chat"),
        ("llama_index", "core_rerank_integrations.CoReNodePostprocessor", "llama-index"),
        (
            "transformers",
            "core_rerank_integrations.CoReReranker('.', heads=[(0, 0)])",
            "transformers",
        ),
    ],
)
def test_a_missing_extra_is_named(missing: str, use: str, extra: str, tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    code = (
        f"import os, sys; os.chdir({str(tmp_path)!r}); sys.modules[{missing!r}] = None\n"
        "import core_rerank_integrations\n"
        f"try: {use}\nexcept ImportError as error: print(error)"
    )
    assert f'pip install "core-rerank-integrations[{extra}]"' in run(code)


@pytest.mark.parametrize(("own_logging", "shown"), [("", True), ("logging.basicConfig()", False)])
def test_what_takes_long_is_shown_unless_the_program_logs(own_logging: str, shown: bool) -> None:
    code = (
        "import contextlib, io, logging\n"
        "from core_rerank_integrations._internal.progress import show_log\n"
        f"{own_logging}\n"
        "show_log(), show_log()\n"
        "with contextlib.redirect_stderr(io.StringIO()) as error:\n"
        "    logging.getLogger('core_rerank_integrations.models.resolve').info('Converting')\n"
        "print(error.getvalue().splitlines())"
    )
    assert run(code).strip() == str(["Converting"] if shown else [])


def test_the_drawing_of_the_layers_is_what_lint_checks() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    checked = project["tool"]["importlinter"]["contracts"][0]["layers"]
    design = (ROOT / "docs/design.md").read_text()
    drawn = design.partition("```layers\n")[2].partition("```")[0]
    assert drawn.splitlines() == checked


def test_unknown_names_are_attribute_errors() -> None:
    import core_rerank_integrations

    with pytest.raises(AttributeError, match="has no attribute 'Reranker'"):
        core_rerank_integrations.Reranker  # noqa: B018
    assert set(core_rerank_integrations.__all__) <= set(dir(core_rerank_integrations))
