"""What an import costs, what a missing extra reports, and what the project says about itself."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml

from core_rerank_integrations import __version__

ROOT = Path(__file__).parents[2]
FRAMEWORKS = ["torch", "transformers", "openvino", "vllm", "langchain_core", "llama_index"]
USED_LATE = ["httpx", "huggingface_hub", "rich", "sentencex", "tqdm", "typer", "yaml"]


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_imports_no_framework() -> None:
    code = (
        "import sys, core_rerank_integrations as c; c.CoReReranker; c.HeadSet; c.RerankResult\n"
        f"print([name for name in {FRAMEWORKS + USED_LATE} if name in sys.modules])"
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
        ("fastapi", "import core_rerank_integrations.serving.app", "server"),
        ("prometheus_client", "import core_rerank_integrations.serving.app", "server"),
        ("ray", "import core_rerank_integrations.serving.ray", "ray"),
        ("pyarrow", "core_rerank_integrations.batch.rerank_dataset", "ray"),
        ("llama_index", "core_rerank_integrations.CoReNodePostprocessor", "llama-index"),
        ("yaml", "core_rerank_integrations.HeadSet.load('heads.yaml')", "cli"),
        ("httpx", "core_rerank_integrations.RemoteReranker('http://host')", "client"),
        (
            "transformers",
            "core_rerank_integrations.CoReReranker('.', heads=[(0, 0)])",
            "transformers",
        ),
    ],
)
def test_a_missing_extra_is_named(missing: str, use: str, extra: str, tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "heads.yaml").touch()
    code = (
        f"import os, sys; os.chdir({str(tmp_path)!r}); sys.modules[{missing!r}] = None\n"
        "import core_rerank_integrations, core_rerank_integrations.batch\n"
        f"try: {use}\nexcept ImportError as error: print(error)"
    )
    assert f'pip install "core-rerank-integrations[{extra}]"' in run(code)


@pytest.mark.parametrize(("own_logging", "shown"), [("", True), ("logging.basicConfig()", False)])
def test_what_takes_long_is_shown_unless_the_program_logs(own_logging: str, shown: bool) -> None:
    code = (
        "import contextlib, io, logging\n"
        "from core_rerank_integrations._internal.progress import log_to_stderr\n"
        f"{own_logging}\n"
        "log_to_stderr(), log_to_stderr()\n"
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


def test_the_public_api_is_complete() -> None:
    import core_rerank_integrations

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (plugin,) = project["entry-points"]["vllm.general_plugins"].values()
    plugins = {name for group in project["entry-points"].values() for name in group}
    page = (ROOT / "docs/public-api.md").read_text()
    named = set(re.findall(r"`([\w.:-]+)`", page))
    assert {*core_rerank_integrations.__all__, plugin, *plugins} <= named
    assert project["optional-dependencies"].keys() - named == {"docs", "test", "dev"}


def test_the_strings_of_vllm_engines_exist() -> None:
    from core_rerank_integrations.backends.vllm import worker

    assert "CoReWorkerExtension" in dir(worker)
    (plugin,) = entry_points(group="vllm.general_plugins", name="core_rerank")
    assert plugin.value == "core_rerank_integrations.backends.vllm.plugin:register"
    assert callable(plugin.load())
    (routes,) = entry_points(group="vllm.endpoint_plugins", name="core_rerank_server")
    assert routes.load().name == routes.name


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__


def test_unknown_names_are_attribute_errors() -> None:
    import core_rerank_integrations

    with pytest.raises(AttributeError, match="attribute Reranker"):
        core_rerank_integrations.Reranker  # noqa: B018
    assert set(core_rerank_integrations.__all__) <= set(dir(core_rerank_integrations))
