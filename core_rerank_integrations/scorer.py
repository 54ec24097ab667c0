"""The attention scorer: from lists of documents to their scores.

Reranking, finding heads, fitting and evaluation all use `AttentionScorer`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, groupby
from statistics import median
from typing import Any

import numpy as np

from core_rerank_integrations.backends.base import AttentionBackend, PromptGroup
from core_rerank_integrations.backends.loading import load_backend
from core_rerank_integrations.errors import BackendError
from core_rerank_integrations.heads.head_set import HeadSet
from core_rerank_integrations.method.list_scores import (
    ScoredList,
    WindowAttention,
    WindowScores,
    merge_windows,
)
from core_rerank_integrations.method.prompt import PromptEncoder, SharedPrefix, TokenIds
from core_rerank_integrations.method.scoring import Mass
from core_rerank_integrations.method.windows import (
    Candidates,
    Layout,
    Window,
    WindowPlanner,
    baseline_candidates,
)
from core_rerank_integrations.models.encoder import load_encoder
from core_rerank_integrations.models.local_model import LocalModel
from core_rerank_integrations.settings import RerankerSettings

BATCH_PROMPTS = 128
"""Number of prompts between two updates of a progress bar."""
BATCH_SCORED_PROMPTS = 4096
"""Number of prompts that are scored together. A backend that sees a whole list at once can use what
it has cached before new documents take its place."""
CACHE_BATCH_DOCUMENTS = 32
"""Number of documents between two updates of the progress bar; seconds on a laptop."""


class AttentionScorer:
    """Score lists of documents with one model. Thread-safe.

    Args:
        encoder: Encoder of the prompts.
        backend: Backend that runs the model.
    """

    def __init__(self, encoder: PromptEncoder, backend: AttentionBackend) -> None:
        self.encoder = encoder
        self.backend = backend
        self._planner = WindowPlanner(encoder, backend.max_context)

    def plan(self, lists: Iterable[Candidates], layout: Layout) -> list[list[Window]]:
        """Divide each list into prompts.

        Raises:
            InvalidInputError: A query leaves no room for a document.
        """
        return [self._planner.windows(candidates, layout) for candidates in lists]

    def read(self, windows: Sequence[Window], weights: Mass | None = None) -> list[WindowAttention]:
        """Compute the attention of all prompts at once.

        Args:
            windows: The prompts. Those that share a prefix share its computation.
            weights: Weights of the heads, shape [weight sets, heads]; ``None`` for each head.

        Raises:
            BackendError: The attention of a prompt is not a number.
        """
        prefixes: dict[bytes, SharedPrefix] = {}
        questions: dict[bytes, dict[bytes, TokenIds]] = {}
        for window in windows:
            key = window.prefix.key
            prefixes[key] = window.prefix
            questions.setdefault(key, {})[window.question.tobytes()] = window.question
        groups = [
            PromptGroup(prefix, list(questions[key].values())) for key, prefix in prefixes.items()
        ]
        masses = dict(zip(prefixes, self.backend.attention_mass(groups, weights), strict=True))
        found = {
            (key, question): mass
            for key, group in masses.items()
            for question, mass in zip(questions[key], group.questions, strict=True)
        }
        for mass in (*found.values(), *(group.baseline for group in masses.values())):
            if not np.isfinite(mass).all():
                raise BackendError(
                    "the attention of a prompt is not a number: the model's activations exceed the "
                    "range of its dtype. Use dtype='bfloat16' or 'float32'"
                )
        return [
            WindowAttention(
                window,
                found[window.prefix.key, window.question.tobytes()],
                masses[window.prefix.key].baseline,
            )
            for window in windows
        ]

    def stream(
        self,
        windows: Sequence[Window],
        weights: Mass | None = None,
        batch_prompts: int = BATCH_PROMPTS,
    ) -> Iterator[tuple[int, WindowAttention]]:
        """Compute the attention of many prompts, batch by batch.

        Prompts of the same documents are computed together, whichever list they belong to.

        Args:
            windows: The prompts.
            weights: As for `read`.
            batch_prompts: Number of prompts whose attention is in memory at once.

        Yields:
            The index of a prompt in ``windows`` and its attention, in any order.
        """
        order = sorted(range(len(windows)), key=lambda index: windows[index].prefix.key)
        for start in range(0, len(order), batch_prompts):
            indices = order[start : start + batch_prompts]
            batch = self.read([windows[index] for index in indices], weights)
            yield from zip(indices, batch, strict=True)

    def score(
        self,
        lists: Sequence[Candidates],
        heads: HeadSet,
        layout: Layout,
        *,
        max_seconds: float | None = None,
        evidence: bool = False,
    ) -> list[ScoredList]:
        """Score the documents of every list; what the first stage adds is not included.

        Args:
            lists: Queries and documents.
            heads: The heads, whose weights are used.
            layout: How the lists become prompts.
            max_seconds: Time limit for all lists, which are then read in order; ``None`` reads
                everything.
            evidence: Whether to return token scores, by the heads' evidence weights.

        Raises:
            BackendError: The attention of a prompt is not a number.
        """
        planned = self.plan(lists, layout)
        windows = [window for windows in planned for window in windows]
        weight_sets = [heads.weights, heads.evidence_weights] if evidence else [heads.weights]
        weights = np.stack(weight_sets)
        attention = (
            self.stream(windows, weights, BATCH_SCORED_PROMPTS)
            if max_seconds is None
            else self._stream_within(max_seconds, planned, weights)
        )
        scored = {
            index: WindowScores(
                window.select(0).scores(heads.scoring.drop_outliers),
                window.select(1).token_scores() if evidence else (),
            )
            for index, window in attention
        }
        results = []
        start = 0
        for candidates, own in zip(lists, planned, strict=True):
            in_time = [scored.get(index) for index in range(start, start + len(own))]
            results.append(merge_windows(own, in_time, len(candidates.documents)))
            start += len(own)
        return results

    def cache_documents(self, documents: Sequence[str], layout: Layout) -> Iterator[int]:
        """Read documents before a question is asked.

        Args:
            documents: Texts of the documents.
            layout: How lists of them become prompts; one document per prompt.

        Yields:
            Number of bytes written to disk, once per document.
        """
        for start in range(0, len(documents), CACHE_BATCH_DOCUMENTS):
            batch = documents[start : start + CACHE_BATCH_DOCUMENTS]
            (windows,) = self.plan([baseline_candidates(batch)], layout)
            yield self.backend.cache_prefixes([window.prefix for window in windows])
            yield from [0] * (len(batch) - 1)

    def clear_cache(self) -> None:
        """Drop all documents from memory."""
        self.backend.clear_cache()

    def close(self) -> None:
        """Free the model."""
        self.backend.close()

    def _stream_within(
        self, seconds: float, planned: Sequence[Sequence[Window]], weights: Mass
    ) -> Iterator[tuple[int, WindowAttention]]:
        """Read the documents of all lists in order, those that fit into the time that remains.

        At least one prompt is read. Whether a document fits is estimated by its tokens and the
        speed of the last prompts, so one enormous document does not use the time of the others.

        Yields:
            The index of a window among those of all lists, and its attention.
        """
        end = time.perf_counter() + seconds
        windows = [window for own in planned for window in own]
        if not windows:
            return
        tokens = [len(window.prefix.ids) + len(window.question) for window in windows]
        waiting = _documents_in_order(planned)
        typical = median(sum(tokens[i] for i in document) for document in waiting)
        first = next(d for d in waiting if sum(tokens[i] for i in d) <= 2 * typical)
        batch = [first.pop(0)]
        while batch:
            begun = time.perf_counter()
            attention = self.read([windows[index] for index in batch], weights)
            yield from zip(batch, attention, strict=True)
            now = time.perf_counter()
            size = sum(tokens[index] for index in batch)
            fitting = size * (end - now) / max(now - begun, 1e-9)
            # The next prompts may be new where these were cached.
            room = min(2 * size, fitting / 2)
            batch = []
            for document in waiting:
                remaining = sum(tokens[index] for index in document)
                if remaining > fitting:
                    continue
                fitting -= remaining
                while document and room > 0:
                    room -= tokens[document[0]]
                    batch.append(document.pop(0))


def _documents_in_order(planned: Sequence[Sequence[Window]]) -> list[list[int]]:
    """Return the indices of the windows of each document, or of the documents of one prompt."""
    numbers = count()
    return [
        [next(numbers) for _ in own]
        for windows in planned
        for _, own in groupby(windows, key=lambda window: window.indices)
    ]


def load_scorer(
    backend: str, settings: RerankerSettings, model: LocalModel, heads: HeadSet, engine: Any = None
) -> AttentionScorer:
    """Load a model and its encoder; see `load_backend`."""
    encoder = load_encoder(model, settings.template or heads.template)
    return AttentionScorer(encoder, load_backend(backend, settings, model, heads, engine))
