"""Judged collections on disk, in the layout of BEIR, and TREC runs over them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core_rerank_integrations._internal.files import write_atomically
from core_rerank_integrations.errors import InvalidInputError

Qrels = dict[str, dict[str, int]]
"""Relevance grade per query id and document id; what is not listed counts as 0."""


@dataclass(frozen=True)
class Passage:
    """A document of a collection."""

    id: str
    title: str
    text: str

    @property
    def content(self) -> str:
        """What is indexed and ranked."""
        return f"{self.title} {self.text}".strip()


@dataclass(frozen=True)
class Collection:
    """Documents, queries and judgments of a folder in the layout of BEIR."""

    passages: dict[str, Passage]
    queries: dict[str, str]
    qrels: Qrels

    @classmethod
    def load(cls, folder: Path, split: str = "test", partial: bool = False) -> Collection:
        """Read ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/<split>.tsv``.

        Queries without a judgment in this split are left out.

        Args:
            folder: Where the files lie.
            split: Which judgments.
            partial: Whether the folder may lack judged documents, as where it holds only the
                candidates of a large corpus. They still count in an ideal ranking.

        Raises:
            InvalidInputError: A file is missing or malformed, or a judgment names a query or,
                unless ``partial``, a document that the folder lacks.
        """
        passages = {
            record["_id"]: Passage(record["_id"], record.get("title", ""), record["text"])
            for record in _records(folder / "corpus.jsonl")
        }
        queries = {record["_id"]: record["text"] for record in _records(folder / "queries.jsonl")}
        qrels: Qrels = {}
        path = folder / "qrels" / f"{split}.tsv"
        for query, passage, grade in _judgments(path):
            for kind, name, known in (("query", query, queries), ("document", passage, passages)):
                if name not in known and not (partial and kind == "document"):
                    raise InvalidInputError(f"{path} judges the {kind} {name!r}, which is missing")
            qrels.setdefault(query, {})[passage] = grade
        return cls(passages, {key: queries[key] for key in queries if key in qrels}, qrels)


Run = dict[str, list[str]]
"""Document ids per query id, best first."""


ScoredRun = dict[str, list[tuple[str, float]]]
"""Document ids and scores per query id, best first."""


def load_run(path: Path, collection: Collection) -> Run:
    """The documents of `load_scored_run`."""
    scored = load_scored_run(path, collection)
    return {query: [document for document, _ in ranking] for query, ranking in scored.items()}


def load_scored_run(path: Path, collection: Collection) -> ScoredRun:
    """Read a TREC run (query id, Q0, document id, rank, score, tag) of a collection's queries.

    Raises:
        InvalidInputError: A line is malformed, or names a query or document that is missing.
    """
    scored: dict[str, list[tuple[float, int, str]]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"cannot read the run {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            query, _, document, rank, score, _ = line.split()
            entry = (-float(score), int(rank), document)
        except ValueError as error:
            raise InvalidInputError(
                f"{path}, line {number}: expected 'query Q0 document rank score tag', got {line!r}"
            ) from error
        if document not in collection.passages:
            raise InvalidInputError(
                f"{path}, line {number}: the document {document!r} is not in the corpus"
            )
        scored.setdefault(query, []).append(entry)
    if unknown := set(scored) - set(collection.queries):
        raise InvalidInputError(
            f"{path} ranks {len(unknown)} queries that this split does not judge, such as "
            f"{min(unknown)!r}; is it the run of another split?"
        )
    if not scored:
        raise InvalidInputError(f"the run {path} is empty")
    # As trec_eval does: by score; of equal scores, by the rank that is written down.
    return {
        query: [(document, -negative) for negative, _, document in sorted(entries)]
        for query, entries in scored.items()
    }


def save_run(path: Path, scores: Mapping[str, Sequence[tuple[str, float]]], tag: str) -> None:
    """Write (document id, score) pairs per query id, best first, as a TREC run."""
    lines = (
        f"{query} Q0 {document} {rank} {score:.9g} {tag}\n"
        for query, ranking in scores.items()
        for rank, (document, score) in enumerate(ranking, start=1)
    )
    write_atomically(path, "".join(lines))


def _records(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                record = json.loads(line)
                if "_id" not in record or "text" not in record:
                    raise InvalidInputError(f"{path}, line {number}: needs '_id' and 'text'")
                yield record
    except (OSError, json.JSONDecodeError) as error:
        raise InvalidInputError(f"cannot read {path}: {error}") from error


def _judgments(path: Path) -> Iterator[tuple[str, str, int]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t")
            if missing := {"query-id", "corpus-id", "score"} - set(rows.fieldnames or ()):
                raise ValueError(f"no column {', '.join(sorted(missing))}")
            for row in rows:
                yield row["query-id"], row["corpus-id"], int(row["score"])
    except (OSError, KeyError, ValueError) as error:
        raise InvalidInputError(
            f"cannot read {path}: {error!r}; it needs tab-separated query-id, corpus-id, score"
        ) from error
