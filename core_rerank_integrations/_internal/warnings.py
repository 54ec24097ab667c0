"""Warnings that point at the code of the user that called this package."""

from __future__ import annotations

import os
import sys
import warnings
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

PACKAGE = __name__.partition(".")[0]
STANDARD_LIBRARY = f"{Path(os.__file__).parent}{os.sep}"


class _Location(NamedTuple):
    """A line of code, as `warnings.warn_explicit` takes it."""

    filename: str
    lineno: int
    module: str
    registry: dict[Any, Any]

    @classmethod
    def of(cls, frame: FrameType) -> _Location:
        names = frame.f_globals
        registry = names.setdefault("__warningregistry__", {})
        return cls(frame.f_code.co_filename, frame.f_lineno, names.get("__name__", ""), registry)


_caller: ContextVar[_Location | None] = ContextVar("core_rerank_caller", default=None)


def remember_caller() -> None:
    """Let `warn_caller` find this call's caller from other threads with the same context."""
    frame = _user_frame(sys._getframe(1))
    _caller.set(_Location.of(frame) if frame else None)


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning at the first frame outside this package and all installed libraries.

    If there is none, as in a thread of a library, the warning points at the line that
    `remember_caller` has seen, or at the library.
    """
    frame = sys._getframe(1)
    location = _Location.of(user) if (user := _user_frame(frame)) else _caller.get()
    while not location:
        if not _is_own(frame) or frame.f_back is None:
            location = _Location.of(frame)
        else:
            frame = frame.f_back
    warnings.warn_explicit(message, category, *location)


def _user_frame(frame: FrameType | None) -> FrameType | None:
    while frame and (_is_own(frame) or _is_library(frame.f_code.co_filename)):
        frame = frame.f_back
    return frame


def _is_own(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).partition(".")[0] == PACKAGE


def _is_library(path: str) -> bool:
    folders = ("site-packages", "dist-packages")
    return path.startswith((STANDARD_LIBRARY, "<frozen ")) or any(name in path for name in folders)
