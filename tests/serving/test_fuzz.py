"""Requests that schemathesis makes from the schema, valid and invalid ones."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / ".venv-tools" / "bin" / "schemathesis"
CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
]
SECONDS = 110


@pytest.mark.fuzz
@pytest.mark.filterwarnings("ignore::core_rerank_integrations.DocumentTruncatedWarning")
@pytest.mark.filterwarnings("ignore::core_rerank_integrations.LongDocumentWarning")
def test_no_request_makes_the_server_fail(server, tmp_path: Path) -> None:
    command = [TOOL, "run", f"{server.url}/openapi.json", "--max-time", str(SECONDS)]
    checks = ["--checks", ",".join(CHECKS), "--continue-on-failure", "--warnings", "off"]
    done = subprocess.run(
        [*command, *checks, "--no-color"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    assert done.returncode == 0, done.stdout
    assert server.client.get("/ready").status_code == 200
