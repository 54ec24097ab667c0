"""What the commands share: errors without tracebacks, and progress with time left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from core_rerank_integrations.errors import CoReError

T = TypeVar("T")


@contextmanager
def clear_errors() -> Iterator[None]:
    """What went wrong, without a traceback: the message says what to do."""
    try:
        yield
    except CoReError as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", markup=True, highlight=False)
        raise typer.Exit(1) from error


def tracked(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items, with a bar, throughput and time left on standard error."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total, rate="")
        for item in items:
            yield item
            speed = progress.tasks[0].speed
            progress.update(task, advance=1, rate=f"{60 * speed:.0f}/min" if speed else "")
