"""Files of documents that commands read."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from reprlib import repr as shortened
from typing import Annotated, Any

import typer
from pydantic import AliasChoices, BaseModel, Field

from core_rerank_integrations._internal.text import (
    decoded,
    numbered_lines,
    parsed_json,
    record_of,
)
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

JSON_START = re.compile(r'\s*(\[\s*[{"]|\{\s*")')
"""Start of a text that is JSON, although it may be damaged."""


class _Document(BaseModel):
    """A document of a JSON file; other keys are ignored."""

    text: str
    title: str | None = None
    id: str | int | None = Field(default=None, validation_alias=AliasChoices("id", "_id"))


def read_documents(path: Path) -> tuple[list[str], list[str]]:
    """Read the ids and the texts of documents.

    Args:
        path: The file, in UTF-8 or, with a byte order mark, UTF-16; ``-`` for standard input.

    Returns:
        The ids (by default numbers from 1), and the texts with their titles in front.

    Raises:
        InvalidInputError: The file cannot be read, holds no documents, or holds something else;
            the message names the line or the document.
    """
    if str(path) == "-" and sys.stdin is None:
        raise InvalidInputError("cannot read documents from -: standard input is closed")
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except (OSError, ValueError) as error:  # A path may hold NUL.
        raise InvalidInputError(f"cannot read documents from {path}: {error}") from error
    places: dict[str, str] = {}
    texts = []
    for number, (place, record) in enumerate(_records(decoded(content, path), path), start=1):
        document = _document(record, place)
        name = str(number if document.id is None else document.id)
        if name in places:
            raise InvalidInputError(f"{place} has the id {name!r} of {places[name]}")
        places[name] = place
        texts.append(f"{document.title} {document.text}" if document.title else document.text)
    if not texts:
        raise InvalidInputError(f"{path} holds no documents")
    return list(places), texts


def _document(record: Any, place: str) -> _Document:
    if isinstance(record, str):
        return _Document(text=record)
    if isinstance(record, dict):
        return record_of(_Document, record, place)
    raise InvalidInputError(
        f"{place} must be a string or an object with a string 'text', got {shortened(record)}"
    )


def _records(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place and the content of each document: of an array, of JSONL or of plain lines.

    Damaged JSON is an error, never plain text: a file is JSON if it starts like JSON, or if one
    of its lines is an object or a string in quotes.

    Raises:
        InvalidInputError: The file is damaged JSON.
    """
    damage = ""
    try:
        whole = parsed_json(text)
    except ValueError as error:
        whole, damage = None, str(error)
    if isinstance(whole, list | dict):
        items = whole if isinstance(whole, list) else [whole]
        yield from ((f"document {n} of {path}", item) for n, item in enumerate(items, start=1))
        return
    lines = numbered_lines(text)
    values = {n: _parsed_line(line) for n, line in lines}
    is_array = text.lstrip().startswith("[")
    is_json = JSON_START.match(text) is not None
    if (is_json and is_array) or not any(
        isinstance(value, dict | str) for value in values.values()
    ):
        if is_json:
            raise InvalidInputError(
                f"{path} is not JSON: {damage}; write an array, or one document per line"
            )
        values = dict(lines)
    for number, value in values.items():
        place = f"{path}, line {number}"
        if isinstance(value, ValueError):
            raise InvalidInputError(f"{place} is not JSON, and other lines are: {value}")
        yield place, value


def _parsed_line(line: str) -> Any:
    """Parse a line of JSON; return the error if it is something else."""
    try:
        return parsed_json(line)
    except ValueError as error:
        return error
