"""Text files of users."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from core_rerank_integrations.errors import InvalidInputError

Record = TypeVar("Record", bound=BaseModel)


def decoded(content: bytes, path: Path) -> str:
    r"""Decode a text file: UTF-8, or UTF-16 with a byte order mark. Lines end with ``\n``.

    Args:
        content: The file's content.
        path: The file, for errors.

    Raises:
        InvalidInputError: The file is not text in these encodings; the message names the line.
    """
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
        start = text.find("\0")
        line = text.count("\n", 0, start) + 1
        problem = "a NUL character" if start >= 0 else ""
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        problem = f"bytes that are not {'UTF-16' if is_utf16 else 'UTF-8'}: {error.reason}"
    if problem:
        raise InvalidInputError(f"{path}, line {line}: {problem}; save the file as text in UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def numbered_lines(text: str) -> list[tuple[int, str]]:
    """Return the lines that are not blank, with their numbers from 1.

    Only line ends separate lines, unlike in `str.splitlines`: strings of JSON may hold the other
    separators, such as U+2028.
    """
    return [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Read the lines of a file that are not blank, with their numbers from 1.

    Raises:
        InvalidInputError: The file cannot be read, or is not text.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # A path may hold NUL.
        raise InvalidInputError(f"cannot read {path}: {error}") from error
    return numbered_lines(decoded(content, path))


def parsed_json(text: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: The text is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise ValueError(f"{error.msg}, {line}column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def record_of(kind: type[Record], value: Any, place: str) -> Record:
    """Validate an object of a JSON file without conversions; other keys are ignored.

    Args:
        kind: The keys and their types.
        value: The object.
        place: Its file and line, for errors.

    Raises:
        InvalidInputError: The value is not an object, lacks a key, or has one of the wrong type.
    """
    try:
        return kind.model_validate(value, strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ": ".join([place, *map(str, problem["loc"])])
        raise InvalidInputError(
            f"{key}: {problem['msg']}, got {shortened(problem['input'])}"
        ) from error
