"""Judged collections in the layout of BEIR, and TREC runs over them."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from core_rerank_integrations._internal.files import write_atomically
from core_rerank_integrations._internal.text import parsed_json, read_lines, record_of
from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.method.windows import Candidates

Qrels = dict[str, dict[str, int]]
"""Relevance grade per query id and document id; a pair that is not listed counts as 0."""
Run = dict[str, list[str]]
"""Document ids per query id, best first."""
ScoredRun = dict[str, list[tuple[str, float]]]
"""Document ids and scores per query id, best first."""


class _Record(BaseModel):
    """A document or a query of a collection; other keys are ignored."""

    id: str | int = Field(validation_alias="_id")
    text: str
    title: str | None = None
    answers: list[str] | None = None


class _List(BaseModel):
    """A list of documents for one question; other keys are ignored."""

    id: str | int | None = None
    question: str
    right: str | list[str]
    wrong: list[str]


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
    """Documents, queries and judgments, as in a folder in the layout of BEIR.

    Attributes:
        passages: Documents by id.
        queries: Texts of the queries by id.
        qrels: Judgments; none if they were not loaded.
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
        passages = _passages(folder / "corpus.jsonl")
        records = dict(_records(folder / "queries.jsonl"))
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
            {query: record.text for query, record in judged.items()},
            qrels,
            {query: record.answers for query, record in judged.items() if record.answers},
        )

    @classmethod
    def unjudged(cls, corpus: Path, queries: Path) -> Collection:
        """Read documents and queries, without judgments.

        Args:
            corpus: Documents, as in ``corpus.jsonl``.
            queries: Queries, as in ``queries.jsonl``.

        Raises:
            InvalidInputError: A file is missing or malformed.
        """
        return cls(_passages(corpus), {name: record.text for name, record in _records(queries)}, {})

    def candidates(self, query: str, documents: Iterable[str]) -> Candidates:
        """Return the texts of a query and of documents, which are given by id."""
        texts = tuple(self.passages[document].content for document in documents)
        return Candidates(self.queries[query], texts)

    def has_answer(self, query: str, text: str) -> bool:
        """Return whether a text contains an answer to a query, in any case."""
        answers = (answer.casefold() for answer in self.answers.get(query, ()) if answer.strip())
        return any(answer in text.casefold() for answer in answers)


def has_contrast(grades: Iterable[float]) -> bool:
    """Return whether grades are of both relevant and irrelevant documents."""
    return len({grade > 0 for grade in grades}) == 2


def load_lists(path: Path) -> tuple[Collection, ScoredRun]:
    """Read a file of lists: questions, with documents that answer them and documents that do not.

    Each line is a JSON object with ``question``, ``right`` (a text or a list of texts, empty if
    nothing in the list answers the question) and ``wrong`` (a list of texts), and optionally an
    ``id``. The documents of a list are in random order, which is the same each time.

    Raises:
        InvalidInputError: The file cannot be read, is empty, or a line is malformed.
    """
    passages: dict[str, Passage] = {}
    queries: dict[str, str] = {}
    qrels: Qrels = {}
    run: ScoredRun = {}
    for number, value in _json_lines(path):
        place = f"{path}, line {number}"
        item = record_of(_List, value, place)
        right = [item.right] if isinstance(item.right, str) else item.right
        query = str(number if item.id is None else item.id)
        if query in queries:
            raise InvalidInputError(f"{place} has the id {query!r} of another line")
        texts = [*right, *item.wrong]
        if not texts or not all(text.strip() for text in (item.question, *texts)):
            raise InvalidInputError(f"{place}: the question or a document is empty")
        if repeated := set(right) & set(item.wrong):
            raise InvalidInputError(f"{place}: right and wrong is {min(repeated)!r}")
        names = [f"{query}-{index}" for index in range(1, len(texts) + 1)]
        passages |= {name: Passage(name, "", text) for name, text in zip(names, texts, strict=True)}
        queries[query] = item.question
        qrels[query] = dict.fromkeys(names[: len(right)], 1)
        shuffled = random.Random(number).sample(names, len(names))
        run[query] = [(name, -float(rank)) for rank, name in enumerate(shuffled, start=1)]
    if not run:
        raise InvalidInputError(f"the file {path} holds no list")
    return Collection(passages, queries, qrels), run


def load_run(path: Path, collection: Collection) -> Run:
    """Read the document ids of a TREC run; see `load_scored_run`."""
    scored = load_scored_run(path, collection)
    return {query: [document for document, _ in ranking] for query, ranking in scored.items()}


def load_scored_run(path: Path, collection: Collection) -> ScoredRun:
    """Read a TREC run (query id, Q0, document id, rank, score, tag) of a collection's queries.

    Raises:
        InvalidInputError: A line is malformed, or names a query or document that is missing.
    """
    scored: dict[str, dict[str, tuple[float, int, str]]] = {}
    for number, line in read_lines(path):
        try:
            query, _, document, rank, score, _ = line.split()
            entry = (-float(score), int(rank), document)
        except ValueError:
            entry = (math.nan, 0, "")
        if math.isnan(entry[0]):
            raise InvalidInputError(
                f"{path}, line {number}: expected 'query Q0 document rank score tag', got {line!r}"
            )
        if document not in collection.passages:
            raise InvalidInputError(
                f"{path}, line {number}: the document {document!r} is not in the corpus"
            )
        if document in scored.setdefault(query, {}):
            raise InvalidInputError(
                f"{path}, line {number}: the query {query!r} has the document {document!r} twice"
            )
        scored[query][document] = entry
    if unknown := set(scored) - set(collection.queries):
        raise InvalidInputError(
            f"{path} ranks {len(unknown)} queries that are missing, or that this split does not "
            f"judge, such as {min(unknown)!r}; is it the run of another split?"
        )
    if not scored:
        raise InvalidInputError(f"the run {path} is empty")
    # The order of trec_eval: by score, and by the written rank for equal scores.
    return {
        query: [(document, -negative) for negative, _, document in sorted(entries.values())]
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


def _passages(path: Path) -> dict[str, Passage]:
    return {name: Passage(name, record.title or "", record.text) for name, record in _records(path)}


def _records(path: Path) -> Iterator[tuple[str, _Record]]:
    """Yield the records of a JSONL file by id.

    Raises:
        InvalidInputError: A line is malformed, or repeats an id.
    """
    lines: dict[str, int] = {}
    for number, value in _json_lines(path):
        place = f"{path}, line {number}"
        record = record_of(_Record, value, place)
        name = str(record.id)
        if name in lines:
            raise InvalidInputError(f"{place} has the id {name!r} of line {lines[name]}")
        lines[name] = number
        yield name, record


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each line of a JSONL file.

    Raises:
        InvalidInputError: The file cannot be read, or a line is not JSON.
    """
    for number, line in read_lines(path):
        try:
            yield number, parsed_json(line)
        except ValueError as error:
            raise InvalidInputError(f"{path}, line {number} is not JSON: {error}") from error


def _judgments(path: Path) -> Iterator[tuple[str, str, int]]:
    """Yield the query id, the document id and the grade of each line.

    Raises:
        InvalidInputError: A column is missing, or a line is malformed.
    """
    lines = read_lines(path)
    rows = csv.DictReader((line for _, line in lines), delimiter="\t")
    columns = ("query-id", "corpus-id", "score")
    if missing := set(columns) - set(rows.fieldnames or ()):
        raise InvalidInputError(
            f"cannot read {path}: no column {', '.join(sorted(missing))}; it needs tab-separated "
            f"{', '.join(columns)}"
        )
    try:
        for row in rows:
            yield row["query-id"], row["corpus-id"], int(row["score"])
    except (TypeError, ValueError, csv.Error) as error:
        number, line = lines[rows.line_num - 1]
        raise InvalidInputError(
            f"{path}, line {number}: expected tab-separated {', '.join(columns)}, the score an "
            f"integer, got {line!r}"
        ) from error
