"""Judged questions with their candidates: where they lie, and which of them are drawn."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.heads.scoring_config import Ranked
from core_rerank_integrations.research.collection import Collection, ScoredRun, load_scored_run


class JudgedRun(NamedTuple):
    """A first stage's candidates for the judged questions of a collection.

    Attributes:
        folder: The collection, in the layout of BEIR.
        split: Which judgments.
        run: TREC run of the candidates.
        questions: How many questions to draw; ``None`` for all.
        ranked: Whether the candidates come best first, or of which kind the first stage is.
    """

    folder: Path
    split: str
    run: Path
    questions: int | None = None
    ranked: Ranked = True

    @classmethod
    def parse(cls, text: str) -> JudgedRun:
        """From ``FOLDER:SPLIT:RUN[:N][:KIND]``.

        RUN is a TREC run, or its name in the folder's ``runs/``; KIND is ``bm25``, ``vectors`` or,
        where the order means nothing, ``unordered``.

        Raises:
            InvalidInputError: The text is not of this form.
        """
        match = re.fullmatch(
            r"(?P<folder>[^:]+):(?P<split>[^:]+):(?P<run>[^:]+)(:(?P<count>[1-9]\d*))?"
            r"(:(?P<kind>unordered|bm25|vectors))?",
            text,
        )
        if match is None:
            raise InvalidInputError(f"expected FOLDER:SPLIT:RUN[:N][:KIND], got {text!r}")
        folder, split, run = Path(match["folder"]), match["split"], Path(match["run"])
        in_folder = folder / "runs" / f"{split}.{run}.trec"
        count = int(match["count"]) if match["count"] else None
        ranked = False if match["kind"] == "unordered" else match["kind"] or True
        return cls(
            folder, split, in_folder if in_folder.exists() else run, count, cast(Ranked, ranked)
        )


class Drawn(NamedTuple):
    """What was drawn from a `JudgedRun`.

    Attributes:
        source: From where.
        collection: Documents, queries and judgments.
        run: The candidates.
        queries: Ids of the questions that were drawn.
    """

    source: JudgedRun
    collection: Collection
    run: ScoredRun
    queries: list[str]

    @property
    def label(self) -> str:
        """What a head set's provenance says of it."""
        source = self.source
        order = "" if source.ranked is True else f", {source.ranked or 'unordered'}"
        name = f"{source.folder.name}, {source.split}, {source.run.name}"
        return f"{name}, {len(self.queries)} questions{order}"


def draw(sources: Sequence[JudgedRun], seed: int = 0) -> list[Drawn]:
    """Draw each source's questions, in turn; a question of a folder is drawn once at most.

    Raises:
        InvalidInputError: A file cannot be read, or too few questions are left.
    """
    taken: set[tuple[Path, str]] = set()
    drawn = []
    for source in sources:
        collection = Collection.load(source.folder, source.split)
        run = load_scored_run(source.run, collection)
        shuffled = sorted(run)
        random.Random(seed).shuffle(shuffled)
        folder = source.folder.resolve()
        free = [query for query in shuffled if (folder, query) not in taken]
        queries = free[: source.questions]
        if not queries or len(queries) < (source.questions or 1):
            raise InvalidInputError(
                f"{source.folder}, {source.split}: {source.questions or 'some'} questions were "
                f"asked for, and {len(free)} of {len(shuffled)} are left"
            )
        taken.update((folder, query) for query in queries)
        drawn.append(Drawn(source, collection, run, queries))
    return drawn
