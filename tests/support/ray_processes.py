"""Processes of the Ray cluster that the test process has started."""

from __future__ import annotations

import psutil


def processes(name: str) -> list[psutil.Process]:
    """Return the workers whose titles begin with a name, such as ``ray::MapWorker``."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "".join(process.cmdline()[:1]).startswith(name):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found
