"""What the commands share: options of a model, and errors without tracebacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

from core_rerank_integrations.errors import CoReError
from core_rerank_integrations.settings import RerankerSettings


def _described(name: str) -> Any:
    return typer.Option(help=RerankerSettings.model_fields[name].description)


ModelOption = Annotated[str, _described("model")]
HeadsOption = Annotated[str | None, _described("heads")]
BackendOption = Annotated[str, _described("backend")]
DtypeOption = Annotated[str, _described("dtype")]


@contextmanager
def clear_errors() -> Iterator[None]:
    """What went wrong, without a traceback: the message says what to do."""
    try:
        yield
    except CoReError as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", markup=True, highlight=False)
        raise typer.Exit(1) from error
