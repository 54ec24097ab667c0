"""All commands of ``core-rerank``."""

from __future__ import annotations

import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from core_rerank_integrations import __version__
from core_rerank_integrations.cli import heads, models
from core_rerank_integrations.cli.cache import cache
from core_rerank_integrations.cli.chat import chat
from core_rerank_integrations.cli.common import command
from core_rerank_integrations.cli.evaluate import evaluate
from core_rerank_integrations.cli.rerank import rerank
from core_rerank_integrations.cli.rerank_run import rerank_run
from core_rerank_integrations.cli.serve import serve
from core_rerank_integrations.models.aliases import DEFAULT_MODEL

app = typer.Typer(
    help="Rerank documents by a language model's contrastive retrieval heads.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Rich would take brackets in texts of users for markup, and break paths.
    rich_markup_mode=None,
)
for function in (rerank, rerank_run, cache, chat, serve, evaluate):
    app.command()(function)
app.add_typer(models.app, name="models")
app.add_typer(heads.app, name="heads")


@app.command()
@command
def demo(
    model: Annotated[
        str, typer.Option(help="Alias, hub id, model folder or GGUF file.")
    ] = DEFAULT_MODEL,
    candidates: Annotated[
        int, typer.Option(min=5, max=72, help="Number of passages that are reranked per question.")
    ] = 20,
    questions: Annotated[
        int | None, typer.Option(min=1, help="Number of questions; by default all.")
    ] = None,
) -> None:
    """Show LangChain and LlamaIndex before and after reranking, on a small handbook."""
    from core_rerank_integrations.cli.demo import run_demo

    run_demo(model, candidates, questions)


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """Answer ``--version``, and prepare the output.

    Raises:
        Exit: The version was printed.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        # Windows and redirected output may have an encoding that lacks characters.
        sys.stdout.reconfigure(errors="backslashreplace")
    if version:
        print(__version__)
        raise typer.Exit
