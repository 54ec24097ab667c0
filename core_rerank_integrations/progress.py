"""What takes long says so: log records that a person gets to see, and bars."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class StandardError(logging.Handler):
    """Shows this package's records to a person, where the program has not set up logging itself."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message."""
        if not logging.getLogger().handlers:
            print(self.format(record), file=sys.stderr, flush=True)


def show_log() -> None:
    """Have what takes long say so on standard error, unless the program logs in its own way."""
    log = logging.getLogger(__package__)
    if not log.handlers:
        log.addHandler(StandardError())
        log.setLevel(logging.INFO)


def tracked(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items, with a bar, throughput and time left on standard error."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

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
