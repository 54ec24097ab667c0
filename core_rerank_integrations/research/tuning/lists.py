"""Lists to train on, mixed from several sources by weight."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from core_rerank_integrations.research.sources import Sample


class TuningList(NamedTuple):
    """A question with documents that answer it and documents that do not.

    Attributes:
        question: The question.
        right: Documents that answer it; none if nothing in the list does.
        wrong: Documents that do not answer it.
    """

    question: str
    right: tuple[str, ...]
    wrong: tuple[str, ...]

    @property
    def documents(self) -> tuple[str, ...]:
        """All documents, those that answer the question first."""
        return self.right + self.wrong


def tuning_lists(sample: Sample, candidates: int) -> list[TuningList]:
    """Return the first ``candidates`` of each question of a sample, by their judgments.

    If questions come with answers, unjudged candidates that contain an answer are left out. So
    are lists without a wrong document.
    """
    collection = sample.collection
    lists = []
    for query in sample.queries:
        grades = collection.qrels[query]
        names = [name for name, _ in sample.run[query][:candidates]]
        texts = {name: collection.passages[name].content for name in names}
        right = [text for name, text in texts.items() if grades.get(name, 0) > 0]
        wrong = [
            text
            for name, text in texts.items()
            if grades.get(name, 0) <= 0 and not collection.has_answer(query, text)
        ]
        if wrong:
            lists.append(TuningList(collection.queries[query], tuple(right), tuple(wrong)))
    return lists


class Mixture:
    """Draw lists from several sources by weight.

    The lists of a source come in random order, each once before one comes again.

    Args:
        sources: The lists of each source.
        weights: Weight of each source.
        documents: Maximum number of documents in a drawn list.
        generator: Source of randomness, which is part of a checkpoint.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[TuningList]],
        weights: Sequence[float],
        documents: int,
        generator: random.Random,
    ) -> None:
        self._sources = sources
        self._weights = weights
        self._documents = documents
        self._random = generator
        self.waiting: list[list[int]] = [[] for _ in sources]

    def draw(self) -> TuningList:
        """Draw a list: one of its right documents, if it has any, and a sample of wrong ones."""
        (source,) = self._random.choices(range(len(self._sources)), self._weights)
        lists, waiting = self._sources[source], self.waiting[source]
        if not waiting:
            waiting += self._random.sample(range(len(lists)), len(lists))
        item = lists[waiting.pop()]
        right = tuple(self._random.sample(item.right, min(1, len(item.right))))
        count = min(self._documents - len(right), len(item.wrong))
        return TuningList(item.question, right, tuple(self._random.sample(item.wrong, count)))
