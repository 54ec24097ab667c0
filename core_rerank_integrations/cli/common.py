"""What the commands share: errors without tracebacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from core_rerank_integrations.errors import CoReError


@contextmanager
def clear_errors() -> Iterator[None]:
    """What went wrong, without a traceback: the message says what to do."""
    try:
        yield
    except CoReError as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", markup=True, highlight=False)
        raise typer.Exit(1) from error
