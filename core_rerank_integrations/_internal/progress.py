"""Progress of long work: log records and progress bars on standard error."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any

Progress = Callable[[Iterable[Any], int], Iterable[Any]]
"""Wraps items as they come; takes their number."""


class StderrHandler(logging.Handler):
    """Print records to standard error, unless the program has configured logging itself."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message, above progress bars."""
        if not logging.getLogger().handlers:
            from tqdm.auto import tqdm

            tqdm.write(self.format(record), sys.stderr)


def log_to_stderr() -> None:
    """Show this package's log records on standard error."""
    log = logging.getLogger(__name__.partition(".")[0])
    if not log.handlers:
        log.addHandler(StderrHandler())
        log.setLevel(logging.INFO)


def progress_bar(show: bool, description: str) -> Progress:
    """Return a function that shows items with a progress bar, their rate and the time left.

    Args:
        show: ``False`` returns the items without a bar.
        description: Text in front of the bar.
    """
    if not show:
        return no_progress
    from tqdm.auto import tqdm

    return lambda items, total: tqdm(items, description, total)


def no_progress(items: Iterable[Any], _: int) -> Iterable[Any]:
    """Return the items without a progress bar."""
    return items
