"""Finished queries of a run that was interrupted, in a file beside its output.

The first line says what the rankings depend on besides their candidates. Each other line holds the
ranking of one query, by a digest of its candidates. A last line without its end was being written
when the process died, and does not count.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ValidationError

from core_rerank_integrations.errors import InvalidInputError, StorageError

Ranking = list[tuple[str, float]]
"""Documents by id with their scores, best first."""


class _Head(BaseModel):
    settings: str


class _Line(BaseModel):
    candidates: str
    ranking: Ranking


class Journal:
    """Remember finished rankings on disk.

    Args:
        path: The file.
        settings: What rankings depend on besides their candidates.
    """

    def __init__(self, path: Path, settings: str) -> None:
        self.path = path
        self._settings = settings

    def read(self) -> dict[str, Ranking]:
        """Return finished rankings by the digest of their candidates.

        Raises:
            InvalidInputError: They were made with other settings, or the file is damaged.
            StorageError: The file cannot be read or written.
        """
        try:
            content = self.path.read_bytes() if self.path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                os.truncate(self.path, len(whole))
        except OSError as error:
            raise StorageError(f"cannot read {self.path}: {error}") from error
        if not whole:
            self._append(_Head(settings=self._settings))
            return {}
        head, *lines = whole.splitlines()
        try:
            settings = _Head.model_validate_json(head).settings
            rankings = [_Line.model_validate_json(line) for line in lines]
        except ValidationError as error:
            raise InvalidInputError(
                f"{self.path} is damaged: delete it to begin the run again"
            ) from error
        if settings != self._settings and not rankings:
            self.delete()
            self._append(_Head(settings=self._settings))
        elif settings != self._settings:
            raise InvalidInputError(
                f"{self.path} holds queries that were finished with other settings: {settings}; "
                "use them again, or delete the file to begin the run again"
            )
        return {line.candidates: line.ranking for line in rankings}

    def add(self, rankings: Mapping[str, Ranking]) -> None:
        """Add rankings by the digest of their candidates; they are on disk when this returns.

        Raises:
            StorageError: The file cannot be written.
        """
        self._append(
            *(_Line(candidates=name, ranking=ranking) for name, ranking in rankings.items())
        )

    def delete(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)

    def _append(self, *lines: BaseModel) -> None:
        content = "".join(f"{line.model_dump_json()}\n" for line in lines)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(content.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(
                f"cannot write {self.path}: {error}; free space or choose another folder"
            ) from error
