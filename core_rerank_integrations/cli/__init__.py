"""The command line: ``core-rerank``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from core_rerank_integrations import __version__
from core_rerank_integrations.cli import heads, models
from core_rerank_integrations.cli.chat import chat
from core_rerank_integrations.cli.common import ModelOption, clear_errors
from core_rerank_integrations.cli.evaluate import evaluate_command
from core_rerank_integrations.cli.remember import remember
from core_rerank_integrations.cli.rerank import rerank
from core_rerank_integrations.models.resolve import DEFAULT_MODEL

app = typer.Typer(
    help="Rerank documents by a language model's contrastive retrieval heads.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(rerank)
app.command()(remember)
app.command()(chat)
app.add_typer(models.app, name="models")
app.add_typer(heads.app, name="heads")
app.command("evaluate")(evaluate_command)


@app.command()
def demo(
    model: ModelOption = DEFAULT_MODEL,
    candidates: Annotated[
        int, typer.Option(min=5, max=72, help="Passages reranked a question.")
    ] = 20,
    questions: Annotated[int | None, typer.Option(min=1, help="Questions; default all.")] = None,
) -> None:
    """LangChain and LlamaIndex, before and after reranking, on a small handbook."""
    with clear_errors():
        from core_rerank_integrations.cli.demo import run_demo

        run_demo(Console(), model, candidates, questions)


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """Answer ``--version``."""
    if version:
        print(__version__)
        raise typer.Exit
