"""The command line, ``core-rerank``.

commands.py    all commands
common.py      options from pydantic models, errors without tracebacks, tables
rerank.py      rerank a file of documents
cache.py       read documents before a question is asked
chat.py        a chatbot in the browser
serve.py       a rerank server
models.py      list and download models
heads.py       list, find and fit head sets
evaluate.py    measure rankings on judged questions
demo.py        two frameworks before and after reranking
documents.py   files of documents
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from core_rerank_integrations._internal.progress import log_to_stderr
from core_rerank_integrations.errors import MissingExtraError, requires_extra

PRIVACY = {
    "DO_NOT_TRACK": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""Environment variables that stop libraries from reporting their use, unless the user sets them."""

INTERRUPTED = 130
"""Exit code after an interrupt, as shells give it."""


def app() -> None:
    """Run ``core-rerank``; exit with 1 and an error message if the extra ``cli`` is missing."""
    try:
        with ended_by_interrupts():
            for name, value in PRIVACY.items():
                os.environ.setdefault(name, value)
            log_to_stderr()
            # A line of this package's code would say nothing to a user of the command.
            warnings.formatwarning = lambda message, *_args, **_options: f"warning: {message}\n"
            with requires_extra("cli"):
                from core_rerank_integrations.cli.commands import app as commands
        try:
            commands()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except (MissingExtraError, OSError) as error:
        sys.stdout = None  # Python would flush it again at the end.
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # Inside a command, Typer handles it.
        sys.exit(INTERRUPTED)


@contextmanager
def ended_by_interrupts() -> Iterator[None]:
    """End the program at an interrupt, at once: a library that is being imported may lose it."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.default_int_handler:  # For example in the background.
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
