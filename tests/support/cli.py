"""Runs ``core-rerank`` inside the test process."""

from __future__ import annotations

from typer.testing import CliRunner

from core_rerank_integrations.cli.commands import app


def run(*arguments: str, typed: str | bytes | None = None) -> str:
    """Return what the command prints to standard output."""
    result = CliRunner().invoke(app, list(arguments), input=typed)
    assert result.exit_code == 0, result.output
    return result.stdout


def failed(*arguments: str, typed: str | bytes | None = None, exit_code: int = 1) -> str:
    """Return what the command prints to standard error, on one line."""
    result = CliRunner().invoke(app, list(arguments), input=typed)
    assert result.exit_code == exit_code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())
