"""Files of documents that commands read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from core_rerank_integrations.errors import InvalidInputError

DocumentsFile = Annotated[
    Path,
    typer.Option(
        help="File of documents, or - for standard input: a JSON array, JSONL, or one "
        "document a line. An object's text is its 'text' (with 'title' before it); its 'id' "
        "or '_id' goes into TREC output.",
        allow_dash=True,
    ),
]


def read_documents(path: Path) -> tuple[list[str], list[str]]:
    """Ids and texts.

    Raises:
        InvalidInputError: It cannot be read, holds nothing, or something else than documents.
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


def _parse_documents(text: str) -> list[object]:
    """A JSON array, JSONL (every line an object or a string in quotes), or plain lines."""
    if text.lstrip().startswith("["):
        try:
            parsed = json.loads(text)
        except json.JSONDecodeError:
            pass
        else:
            if isinstance(parsed, list):
                return parsed
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        records = [json.loads(line) for line in lines]
    except json.JSONDecodeError:
        return list(lines)
    return records if all(isinstance(record, str | dict) for record in records) else list(lines)
