"""Says on standard error what takes long."""

from __future__ import annotations

import sys


def say(message: str) -> None:
    """One line, at once."""
    print(message, file=sys.stderr, flush=True)
