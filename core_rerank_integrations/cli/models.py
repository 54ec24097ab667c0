"""``core-rerank models``: models with a short name."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from core_rerank_integrations.cli.common import command
from core_rerank_integrations.models.aliases import ALIASES, DEFAULT_MODEL
from core_rerank_integrations.models.resolve import is_cached, resolve
from core_rerank_integrations.settings import RerankerSettings

app = typer.Typer(help="List and download models.", no_args_is_help=True)


@app.command("list")
def list_models() -> None:
    """List the models that have a short name."""
    table = Table("name", Column("hub id", overflow="fold"), "licence", "on this machine")
    for alias in ALIASES.values():
        here = "yes" if is_cached(alias) else "no"
        table.add_row(alias.name, alias.hub_id, alias.licence, here)
    Console().print(table)


@app.command("fetch")
@command
def fetch_model(
    model: Annotated[str, typer.Argument(help="Alias, hub id or GGUF file.")] = DEFAULT_MODEL,
    revision: Annotated[
        str | None, typer.Option(help=RerankerSettings.model_fields["revision"].description)
    ] = None,
    token: Annotated[
        str | None, typer.Option(help=RerankerSettings.model_fields["token"].description)
    ] = None,
) -> None:
    """Download a model, and print its folder."""
    print(resolve(model, revision=revision, token=token).path)
