"""Judged runs and files of lists, and the samples of questions that are drawn from them."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.heads.scoring_config import Count, FirstStage, Positive
from core_rerank_integrations.research.collection import (
    Collection,
    ScoredRun,
    has_contrast,
    load_lists,
    load_scored_run,
)

PATH = r"([A-Za-z]:[\\/])?[^:]+"
"""A path without colons, except after the drive on Windows."""


LISTS_SUFFIX = ".jsonl"


class JudgedRun(NamedTuple):
    """A first stage's candidates for the judged questions of a collection, or a file of lists.

    Attributes:
        folder: The collection, in the layout of BEIR; or the file of lists.
        split: Name of the judgments; empty for a file of lists.
        run: TREC run of the candidates; or the file of lists.
        questions: Number of questions to draw; ``None`` for all.
        first_stage: Kind of the first stage; ``None`` if the order has no meaning.
    """

    folder: Path
    split: str
    run: Path
    questions: Count | None = None
    first_stage: FirstStage | None = "other"

    @classmethod
    def parse(cls, text: str) -> JudgedRun:
        """Parse ``FOLDER:SPLIT:RUN[:N][:KIND]`` or ``FILE.jsonl[:N]``.

        RUN is a TREC run, or its name in the folder's ``runs/``. N is the number of questions.
        KIND is ``bm25``, ``dense`` or, if the order has no meaning, ``unordered``. FILE holds
        lists; see `load_lists`.

        Raises:
            InvalidInputError: The text has another form.
        """
        if match := re.fullmatch(rf"(?P<file>{PATH}\.jsonl)(:(?P<count>[1-9]\d*))?", text):
            file, count = Path(match["file"]), match["count"]
            return cls(file, "", file, int(count) if count else None, None)
        match = re.fullmatch(
            rf"(?P<folder>{PATH}):(?P<split>[^:]+):(?P<run>{PATH})(:(?P<count>[1-9]\d*))?"
            r"(:(?P<kind>unordered|bm25|dense))?",
            text,
        )
        if match is None:
            raise InvalidInputError(
                f"expected FOLDER:SPLIT:RUN[:N][:KIND] or FILE.jsonl[:N], got {text!r}"
            )
        folder, split, run = Path(match["folder"]), match["split"], Path(match["run"])
        run_in_folder = folder / "runs" / f"{split}.{run}.trec"
        kind = None if match["kind"] == "unordered" else match["kind"] or "other"
        return cls(
            folder,
            split,
            run_in_folder if run_in_folder.exists() else run,
            int(match["count"]) if match["count"] else None,
            cast(FirstStage | None, kind),
        )

    def load(self) -> tuple[Collection, ScoredRun]:
        """Read the collection and the candidates.

        Raises:
            InvalidInputError: A file cannot be read or is malformed.
        """
        if self.run.suffix == LISTS_SUFFIX:
            return load_lists(self.run)
        collection = Collection.load(self.folder, self.split)
        return collection, load_scored_run(self.run, collection)


class WeightedRun(NamedTuple):
    """A judged run, and how often its questions are drawn.

    Attributes:
        run: The judged run.
        weight: Share of the draws, relative to the weights of the other runs.
    """

    run: JudgedRun
    weight: Positive = 1.0

    @classmethod
    def parse(cls, text: str) -> WeightedRun:
        """Parse a `JudgedRun`, optionally with ``*WEIGHT`` at its end.

        Raises:
            InvalidInputError: The text has another form.
        """
        run, star, weight = text.rpartition("*")
        if not star:
            return cls(JudgedRun.parse(text))
        try:
            return cls(JudgedRun.parse(run), float(weight))
        except ValueError:
            raise InvalidInputError(f"expected a number after '*', got {text!r}") from None


class Sample(NamedTuple):
    """Questions that were drawn from a `JudgedRun`.

    Attributes:
        source: The judged run.
        collection: Documents, queries and judgments.
        run: The candidates.
        queries: Ids of the questions.
    """

    source: JudgedRun
    collection: Collection
    run: ScoredRun
    queries: list[str]

    @property
    def label(self) -> str:
        """Description of the sample for a head set's provenance."""
        source = self.source
        if not source.split:
            return f"{source.run.name}, {len(self.queries)} lists"
        kind = "" if source.first_stage == "other" else f", {source.first_stage or 'unordered'}"
        name = f"{source.folder.name}, {source.split}, {source.run.name}"
        return f"{name}, {len(self.queries)} questions{kind}"

    def questions(self) -> Iterator[str]:
        """Yield the texts of the questions, without differences of case and spaces."""
        return (_words(self.collection.queries[query]) for query in self.queries)

    def with_contrast(self, candidates: int) -> Sample:
        """Return the questions whose first candidates are relevant and irrelevant ones.

        A fit learns nothing from the others, so their features need not be computed.
        """
        queries = []
        for query in self.queries:
            grades = self.collection.qrels[query]
            if has_contrast(grades.get(name, 0) for name, _ in self.run[query][:candidates]):
                queries.append(query)
        return self._replace(queries=queries)


def draw_samples(
    sources: Sequence[JudgedRun], seed: int = 0, apart_from: Sequence[Sample] = ()
) -> list[Sample]:
    """Draw the questions of each source in turn; a question of a folder is drawn at most once.

    Args:
        sources: The sources.
        seed: Seed of the draws.
        apart_from: Samples whose questions are not drawn, whatever file they are in.

    Raises:
        InvalidInputError: A file cannot be read, or too few questions are left.
    """
    drawn: set[tuple[Path, str]] = set()
    taken = {text for sample in apart_from for text in sample.questions()}
    samples = []
    for source in sources:
        collection, run = source.load()
        shuffled = sorted(run)
        random.Random(seed).shuffle(shuffled)
        folder = source.folder.resolve()
        left = [
            query
            for query in shuffled
            if (folder, query) not in drawn and _words(collection.queries[query]) not in taken
        ]
        queries = left[: source.questions]
        if not queries or len(queries) < (source.questions or 1):
            raise InvalidInputError(
                f"{source.folder}, {source.split}: {source.questions or 'some'} questions were "
                f"asked for, and {len(left)} of {len(shuffled)} are left"
            )
        drawn.update((folder, query) for query in queries)
        samples.append(Sample(source, collection, run, queries))
    return samples


def _words(text: str) -> str:
    return " ".join(text.casefold().split())
