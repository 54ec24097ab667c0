"""Files of documents that commands read."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from core_rerank_integrations.errors import InvalidInputError

DocumentsFile = Annotated[
    Path,
    typer.Option(
        help="File of documents, or - for standard input: a JSON array, JSONL, or one document "
        "per line. JSON documents are strings or objects with 'text' and, optionally, 'title' and "
        "'id' or '_id'.",
        allow_dash=True,
    ),
]


def read_documents(path: Path) -> tuple[list[str], list[str]]:
    """Read the ids and the texts of documents.

    Args:
        path: The file; ``-`` for standard input.

    Returns:
        The ids (by default numbers from 1), and the texts with their titles in front.

    Raises:
        InvalidInputError: The file cannot be read, holds no documents, or holds something else.
    """
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"cannot read documents from {path}: {error}") from error
    records = _parse_documents(text)
    if not records:
        raise InvalidInputError(f"{path} holds no documents")
    ids, texts = [], []
    for number, record in enumerate(records, start=1):
        if isinstance(record, str):
            record = {"text": record}
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise InvalidInputError(
                f"document {number} of {path} must be a string or an object with a string 'text'"
            )
        ids.append(str(record.get("id", record.get("_id", number))))
        texts.append(f"{record.get('title', '')} {record['text']}".strip())
    return ids, texts


def _parse_documents(text: str) -> list[Any]:
    """Parse a JSON array, JSONL (each line an object or a string in quotes), or plain lines."""
    with suppress(json.JSONDecodeError):
        array = json.loads(text)
        if isinstance(array, list):
            return array
    lines = [line for line in text.splitlines() if line.strip()]
    with suppress(json.JSONDecodeError):
        records = [json.loads(line) for line in lines]
        if all(isinstance(record, str | dict) for record in records):
            return records
    return lines
