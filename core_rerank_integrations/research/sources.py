"""Judged runs, and the samples of questions that are drawn from them."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.heads.scoring_config import Count, FirstStage
from core_rerank_integrations.research.collection import (
    Collection,
    ScoredRun,
    has_contrast,
    load_scored_run,
)

PATH = r"([A-Za-z]:[\\/])?[^:]+"
"""A path without colons, except after the drive on Windows."""


class JudgedRun(NamedTuple):
    """A first stage's candidates for the judged questions of a collection.

    Attributes:
        folder: The collection, in the layout of BEIR.
        split: Name of the judgments.
        run: TREC run of the candidates.
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
        """Parse ``FOLDER:SPLIT:RUN[:N][:KIND]``.

        RUN is a TREC run, or its name in the folder's ``runs/``. N is the number of questions.
        KIND is ``bm25``, ``dense`` or, if the order has no meaning, ``unordered``.

        Raises:
            InvalidInputError: The text has another form.
        """
        match = re.fullmatch(
            rf"(?P<folder>{PATH}):(?P<split>[^:]+):(?P<run>{PATH})(:(?P<count>[1-9]\d*))?"
            r"(:(?P<kind>unordered|bm25|dense))?",
            text,
        )
        if match is None:
            raise InvalidInputError(f"expected FOLDER:SPLIT:RUN[:N][:KIND], got {text!r}")
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
        kind = "" if source.first_stage == "other" else f", {source.first_stage or 'unordered'}"
        name = f"{source.folder.name}, {source.split}, {source.run.name}"
        return f"{name}, {len(self.queries)} questions{kind}"

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


def draw_samples(sources: Sequence[JudgedRun], seed: int = 0) -> list[Sample]:
    """Draw the questions of each source in turn; a question of a folder is drawn at most once.

    Raises:
        InvalidInputError: A file cannot be read, or too few questions are left.
    """
    drawn: set[tuple[Path, str]] = set()
    samples = []
    for source in sources:
        collection = Collection.load(source.folder, source.split)
        run = load_scored_run(source.run, collection)
        shuffled = sorted(run)
        random.Random(seed).shuffle(shuffled)
        folder = source.folder.resolve()
        left = [query for query in shuffled if (folder, query) not in drawn]
        queries = left[: source.questions]
        if not queries or len(queries) < (source.questions or 1):
            raise InvalidInputError(
                f"{source.folder}, {source.split}: {source.questions or 'some'} questions were "
                f"asked for, and {len(left)} of {len(shuffled)} are left"
            )
        drawn.update((folder, query) for query in queries)
        samples.append(Sample(source, collection, run, queries))
    return samples
