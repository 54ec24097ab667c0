"""The one road from a list of documents to its scores: windows, baselines, calibration.

Whoever ranks, fits or evaluates reads through `Reader`; what is done with the readings differs.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from math import ceil
from typing import NamedTuple

import numpy as np
from cachetools import LRUCache

from core_rerank_integrations.backends.base import AttentionBackend
from core_rerank_integrations.evidence import TokenScores
from core_rerank_integrations.heads import HeadSet
from core_rerank_integrations.prompt import BASELINE_QUERY, PromptEncoder, Span
from core_rerank_integrations.scoring import Mass, Scores, document_scores
from core_rerank_integrations.windows import Layout, Window, WindowPlanner

BASELINE_CACHE_VALUES = 4_000_000
"""Values of ``N/A`` attention mass that are kept, at four bytes each."""
BATCH_PROMPTS = 128
"""Prompts of a stream that are read, and held in memory, at once."""

REMEMBERED_AT_ONCE = 32
"""Documents between two steps of the progress that is shown; seconds on a laptop."""


class Candidates(NamedTuple):
    """A query and what is to be ranked for it."""

    query: str
    documents: tuple[str, ...]


class WindowReading(NamedTuple):
    """What the model attends to in one prompt.

    Attributes:
        window: The prompt.
        mass: Attention mass, shape [..., tokens]; with a leading dimension of heads, or summed.
        baseline: The same where ``N/A`` is asked, as far as the end of the last document.
    """

    window: Window
    mass: Mass
    baseline: Mass

    def scores(self, drop_outliers: bool) -> Scores:
        """Of the prompt's documents, shape [..., documents]; see `document_scores`."""
        spans = self.window.prompt.document_spans
        return document_scores(self.mass, self.baseline, spans, drop_outliers)

    def token_scores(self) -> list[TokenScores]:
        """Calibrated mass on the tokens of each document, shape [..., tokens]."""
        window = self.window
        scored = []
        for passage, text, starts, (first, stop) in zip(
            window.passages,
            window.texts,
            window.prompt.document_starts,
            window.prompt.document_spans,
            strict=True,
        ):
            scores = self.mass[..., first:stop].astype(np.float64) - self.baseline[..., first:stop]
            scored.append(TokenScores(passage.start, text, starts, scores))
        return scored

    def weighed(self, weights: Mass) -> WindowReading:
        """A reading by heads, summed: ``weights`` has shape [heads]."""
        return WindowReading(self.window, weights @ self.mass, weights @ self.baseline)

    def sum(self, place: int) -> WindowReading:
        """One of several sums."""
        return WindowReading(self.window, self.mass[place], self.baseline[place])


Readings = Iterable[tuple[int, WindowReading]]
"""Prompts by their places, as they are read; see `Reader.stream`."""

Tracked = Callable[[Readings, int], Readings]
"""Wraps readings as they come, told how many there will be; a progress bar, say."""


def untracked(readings: Readings, _: int) -> Readings:
    """Readings without progress."""
    return readings


class ScoredList(NamedTuple):
    """What the heads say about the documents of one list.

    Attributes:
        scores: Shape [documents]; minus infinity for those that were not read in time.
        passages: Of documents that were read passage by passage, the best one's characters;
            ``None`` for those that were read whole.
        tokens: Per document, what its tokens were given, passage by passage; empty where that was
            not asked for.
    """

    scores: Scores
    passages: list[Span | None]
    tokens: list[list[TokenScores]]


class Reader:
    """Reads lists of documents with one model. Safe to share over threads.

    Args:
        encoder: Writes the prompts.
        backend: Runs the model.
    """

    def __init__(self, encoder: PromptEncoder, backend: AttentionBackend) -> None:
        self.encoder = encoder
        self.backend = backend
        self._planner = WindowPlanner(encoder, backend.max_context)
        self._baselines: LRUCache[tuple[bytes, bytes], Mass] = LRUCache(
            BASELINE_CACHE_VALUES, getsizeof=np.size
        )
        self._lock = threading.Lock()

    def plan(self, lists: Sequence[Candidates], layout: Layout) -> list[list[Window]]:
        """The prompts of each list.

        Raises:
            InvalidInputError: A query leaves no room for a document.
        """
        planned = []
        for candidates in lists:  # A comprehension would be one more frame to warn across.
            planned.append(self._planner.windows(candidates.query, candidates.documents, layout))
        return planned

    def read(
        self, windows: Sequence[Window], by_head: bool = False, sums: Mass | None = None
    ) -> list[WindowReading]:
        """Run the model over ``windows``, all together.

        The attention under ``N/A`` depends on the documents alone: what was computed once is kept.

        Args:
            windows: The prompts.
            by_head: Whether heads are reported one by one, unweighted, instead of their
                weighted sum.
            sums: Weights of several sums in place of the head set's own, shape [sums, heads].
        """
        if not windows:
            return []
        kind = b"heads" if by_head else b"" if sums is None else sums.tobytes()
        baselines = self._known_baselines(windows, kind)
        missing = {
            window.key: self._planner.baseline(window)
            for window in windows
            if window.key not in baselines
        }
        by_head = by_head or sums is not None
        run = self.backend.head_mass if by_head else self.backend.attention_mass
        masses = run([*(window.prompt for window in windows), *missing.values()])
        if sums is not None:
            masses = [sums @ mass for mass in masses]
        for (key, prompt), mass in zip(missing.items(), masses[len(windows) :], strict=True):
            baselines[key] = mass[..., : prompt.documents_stop]
        self._keep_baselines({key: baselines[key] for key in missing}, kind)
        return [
            WindowReading(window, mass, baselines[window.key])
            for window, mass in zip(windows, masses, strict=False)
        ]

    def stream(
        self, windows: Sequence[Window], by_head: bool = False
    ) -> Iterator[tuple[int, WindowReading]]:
        """Read many prompts, those of the same documents together, whichever lists they are of.

        What stands before the query is then computed once for all of them, and memory holds the
        readings of one batch.

        Args:
            windows: The prompts.
            by_head: As for `read`.

        Yields:
            A prompt's place in ``windows``, and its reading; in an order of its own.
        """
        order = sorted(range(len(windows)), key=lambda place: windows[place].key)
        for start in range(0, len(order), BATCH_PROMPTS):
            places = order[start : start + BATCH_PROMPTS]
            readings = self.read([windows[place] for place in places], by_head)
            yield from zip(places, readings, strict=True)

    def score(
        self,
        lists: Sequence[Candidates],
        heads: HeadSet,
        layout: Layout,
        max_seconds: float | None = None,
        evidence: bool = False,
    ) -> list[ScoredList]:
        """Score every list by the weighted sum of the heads; their order plays no part.

        Args:
            lists: What is to be scored.
            heads: By which heads.
            layout: How the lists become prompts.
            max_seconds: Time for all lists, which are then read in their order, document by
                document, until it is over; ``None`` reads everything.
            evidence: Whether to tell what each token was given, by the heads' evidence weights.
        """
        planned = self.plan(lists, layout)
        windows = [window for windows in planned for window in windows]
        sums = np.stack([heads.weights, heads.evidence_weights]) if evidence else None
        if max_seconds is None:
            readings = iter(self.read(windows, sums=sums))
        else:
            readings = iter(self._read_within(max_seconds, windows, sums))
        return [
            _scored(windows, list(islice(readings, len(windows))), heads, len(documents), evidence)
            for (_, documents), windows in zip(lists, planned, strict=True)
        ]

    def remember(self, documents: Sequence[str], layout: Layout) -> Iterator[int]:
        """Read documents before anything is asked about them.

        Args:
            documents: Their texts.
            layout: How lists of them will be read; one document a prompt.

        Yields:
            Bytes written to disk, once a document, as they are read.
        """
        for start in range(0, len(documents), REMEMBERED_AT_ONCE):
            batch = tuple(documents[start : start + REMEMBERED_AT_ONCE])
            (windows,) = self.plan([Candidates(BASELINE_QUERY, batch)], layout)
            yield self.backend.remember([window.prompt for window in windows])
            yield from [0] * (len(batch) - 1)

    def forget(self) -> None:
        """Drop what memory keeps of documents that were read."""
        with self._lock:
            self._baselines.clear()
        self.backend.forget()

    def close(self) -> None:
        """Free the model."""
        self.backend.close()

    def _read_within(
        self, seconds: float, windows: Sequence[Window], sums: Mass | None
    ) -> list[WindowReading]:
        """Readings of the first windows, at least one, until the next would take too long."""
        end = time.perf_counter() + seconds
        readings: list[WindowReading] = []
        count = 1
        while len(readings) < len(windows):
            begun = time.perf_counter()
            part = windows[len(readings) : len(readings) + count]
            readings += self.read(part, sums=sums)
            now = time.perf_counter()
            fitting = int(count * (end - now) / max(now - begun, 1e-9))
            if fitting < 1:
                break
            # The next ones may be longer, or new where these were known.
            count = min(2 * count, ceil(fitting / 2))
        return readings

    def _known_baselines(self, windows: Sequence[Window], kind: bytes) -> dict[bytes, Mass]:
        with self._lock:
            return {
                window.key: mass
                for window in windows
                if (mass := self._baselines.get((window.key, kind))) is not None
            }

    def _keep_baselines(self, masses: dict[bytes, Mass], kind: bytes) -> None:
        with self._lock:
            for key, mass in masses.items():
                if mass.size <= self._baselines.maxsize:
                    self._baselines[key, kind] = mass


def layout_of(heads: HeadSet, max_document_tokens: int | None = None) -> Layout:
    """How ``heads`` want a list to be read."""
    rule = heads.rule
    return Layout(rule.window, rule.reverse, rule.passage_tokens, max_document_tokens)


def collected(windows: Sequence[Window], scores: Sequence[Scores], documents: int) -> ScoredList:
    """The scores of one list from those of its prompts; of a document's passages the best counts.

    Args:
        windows: The list's prompts.
        scores: Of each prompt's documents; of the first prompts, if the last were not read. A
            document that was not read to its end has no score.
        documents: How many the list has.
    """
    collected_scores = np.full(documents, -np.inf)
    passages: list[Span | None] = [None] * documents
    pieces = Counter(index for window in windows for index in window.indices)
    for window, window_scores in zip(windows, scores, strict=False):
        for index, passage, score in zip(
            window.indices, window.passages, window_scores, strict=True
        ):
            if score > collected_scores[index]:
                collected_scores[index] = score
                passages[index] = passage if pieces[index] > 1 else None
    for window in windows[len(scores) :]:
        for index in window.indices:
            collected_scores[index], passages[index] = -np.inf, None
    return ScoredList(collected_scores, passages, [[] for _ in range(documents)])


def _scored(
    windows: Sequence[Window],
    readings: Sequence[WindowReading],
    heads: HeadSet,
    documents: int,
    evidence: bool,
) -> ScoredList:
    """From the readings of one list; with ``evidence`` these hold two sums, see `Reader.score`."""
    summed = [reading.sum(0) for reading in readings] if evidence else readings
    scores = [reading.scores(heads.rule.drop_outliers) for reading in summed]
    scored = collected(windows, scores, documents)
    if evidence:
        for window, reading in zip(windows, readings, strict=False):
            tokens = reading.sum(1).token_scores()
            for index, of_document in zip(window.indices, tokens, strict=True):
                scored.tokens[index].append(of_document)
    return scored
