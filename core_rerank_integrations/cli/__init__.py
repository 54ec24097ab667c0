"""The command line, ``core-rerank``.

commands.py    all commands
common.py      options from pydantic models, and errors without tracebacks
rerank.py      rerank a file of documents
cache.py       read documents before a question is asked
chat.py        a chatbot in the browser
models.py      list and download models
heads.py       list, find and fit head sets
evaluate.py    measure rankings on judged questions
demo.py        two frameworks before and after reranking
documents.py   files of documents
"""

from __future__ import annotations

import sys

from core_rerank_integrations.errors import MissingExtraError, requires_extra


def app() -> None:
    """Run ``core-rerank``; exit with 1 and an error message if the extra ``cli`` is missing."""
    try:
        with requires_extra("cli"):
            from core_rerank_integrations.cli.commands import app as commands
    except MissingExtraError as error:
        sys.exit(f"error: {error}")
    commands()
