"""Judged collections in the layout of BEIR, and TREC runs over them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core_rerank_integrations._internal.files import write_atomically
from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.method.windows import Candidates

Qrels = dict[str, dict[str, int]]
"""Relevance grade per query id and document id; a pair that is not listed counts as 0."""
Run = dict[str, list[str]]
"""Document ids per query id, best first."""
ScoredRun = dict[str, list[tuple[str, float]]]
"""Document ids and scores per query id, best first."""


@dataclass(frozen=True)
class Passage:
    """A document of a collection."""

    id: str
    title: str
    text: str

    @property
    def content(self) -> str:
        """Title and text, which are indexed and ranked."""
        return f"{self.title} {self.text}".strip()


@dataclass(frozen=True)
class Collection:
    """Documents, queries and judgments of a folder in the layout of BEIR.

    Attributes:
        passages: Documents by id.
        queries: Texts of the judged queries by id.
        qrels: Judgments.
        answers: Answers by query id, for queries that come with answers.
    """

    passages: dict[str, Passage]
    queries: dict[str, str]
    qrels: Qrels
    answers: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, split: str = "test", partial: bool = False) -> Collection:
        """Read ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/<split>.tsv``.

        Queries without a judgment in this split are left out. A query may have ``answers``, a
        list of strings.

        Args:
            folder: Folder of the files.
            split: Name of the judgments.
            partial: Whether the folder may lack judged documents, for example if it holds only
                the candidates of a large corpus. They still count in an ideal ranking.

        Raises:
            InvalidInputError: A file is missing or malformed, or a judgment names a query or,
                unless ``partial``, a document that the folder lacks.
        """
        passages = {
            record["_id"]: Passage(record["_id"], record.get("title", ""), record["text"])
            for record in _records(folder / "corpus.jsonl")
        }
        records = {record["_id"]: record for record in _records(folder / "queries.jsonl")}
        qrels: Qrels = {}
        path = folder / "qrels" / f"{split}.tsv"
        for query, document, grade in _judgments(path):
            if query not in records:
                raise InvalidInputError(f"{path} judges the query {query!r}, which is missing")
            if document not in passages and not partial:
                raise InvalidInputError(
                    f"{path} judges the document {document!r}, which is missing"
                )
            qrels.setdefault(query, {})[document] = grade
        judged = {query: record for query, record in records.items() if query in qrels}
        return cls(
            passages,
            {query: record["text"] for query, record in judged.items()},
            qrels,
            {query: record["answers"] for query, record in judged.items() if "answers" in record},
        )

    def candidates(self, query: str, documents: Iterable[str]) -> Candidates:
        """Return the texts of a query and of documents, which are given by id."""
        texts = tuple(self.passages[document].content for document in documents)
        return Candidates(self.queries[query], texts)

    def has_answer(self, query: str, text: str) -> bool:
        """Return whether a text contains an answer to a query, in any case."""
        return any(answer.casefold() in text.casefold() for answer in self.answers.get(query, ()))


def has_contrast(grades: Iterable[float]) -> bool:
    """Return whether grades are of both relevant and irrelevant documents."""
    return len({grade > 0 for grade in grades}) == 2


def load_run(path: Path, collection: Collection) -> Run:
    """Read the document ids of a TREC run; see `load_scored_run`."""
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
    # The order of trec_eval: by score, and by the written rank for equal scores.
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
                if not isinstance(record, dict) or not {"_id", "text"} <= record.keys():
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
