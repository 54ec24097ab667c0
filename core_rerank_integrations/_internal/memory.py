"""Memory of the process, where the C library is that of Linux."""

from __future__ import annotations

import ctypes
import sys

LARGE = 1 << 17
"""Bytes from which the C library asks the system for a block of its own, before it adapts."""
MMAP_THRESHOLD = -3
"""Number of this setting for ``mallopt``, from ``malloc.h``."""


def return_freed_memory() -> None:
    """Return freed memory to the system, of which the C library keeps small pieces for later."""
    _call("malloc_trim", 0)


def return_large_blocks() -> None:
    """Return every large block to the system as soon as it is freed, from now on.

    By default the C library takes ever larger blocks from pools, one for each thread. Cached
    documents that come and go then leave holes: a server needed a gibibyte more.
    """
    _call("mallopt", MMAP_THRESHOLD, LARGE)


def _call(name: str, *arguments: int) -> None:
    if sys.platform == "linux" and (function := getattr(ctypes.CDLL(None), name, None)):
        function(*arguments)
