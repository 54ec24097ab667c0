"""Judged collections on disk, and how good a ranking of them is."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core_rerank_integrations.errors import InvalidInputError, requires_extra

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
    def load(cls, folder: Path, split: str = "test") -> Collection:
        """Read ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/<split>.tsv``.

        Queries without a judgment in this split are left out.

        Raises:
            InvalidInputError: A file is missing or malformed, or a judgment names a query or
                document that the folder lacks.
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
                if name not in known:
                    raise InvalidInputError(f"{path} judges the {kind} {name!r}, which is missing")
            qrels.setdefault(query, {})[passage] = grade
        return cls(passages, {key: queries[key] for key in queries if key in qrels}, qrels)


def measure(qrels: Qrels, run: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """nDCG@10 and MRR of a run: document ids per query id, best first."""
    with requires_extra("eval"):
        import ir_measures
    scored = {
        query: {passage: -float(rank) for rank, passage in enumerate(ranking)}
        for query, ranking in run.items()
    }
    names = {ir_measures.nDCG @ 10: "nDCG@10", ir_measures.RR: "MRR"}
    values = ir_measures.calc_aggregate(list(names), qrels, scored)
    return {name: float(values[metric]) for metric, name in names.items()}


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
