"""``core-rerank models``: models with a short name."""

from __future__ import annotations

from typing import Annotated

import typer

from core_rerank_integrations.cli.common import command, print_table
from core_rerank_integrations.heads.shipped import default_head_set, sets_of
from core_rerank_integrations.models.adapter import with_adapter
from core_rerank_integrations.models.aliases import ALIASES, DEFAULT_MODEL
from core_rerank_integrations.models.resolve import is_cached, resolve
from core_rerank_integrations.settings import RerankerSettings

app = typer.Typer(help="List and download models.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_models() -> None:
    """List the models that have a short name."""
    rows = [
        (alias.name, alias.hub_id, alias.licence, "yes" if is_cached(alias) else "no")
        for alias in ALIASES.values()
    ]
    print_table(("name", "hub id", "licence", "on this machine"), rows)


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
    """Download a model and the adapter of its default heads, and print the model's folder."""
    found = resolve(model, revision=revision, token=token)
    if sets_of(found.model_id):
        with_adapter(found, default_head_set(found.model_id), token=token)
    print(found.path)
