"""From the attention on each prompt to the scores of a list of documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from core_rerank_integrations.method.evidence import TokenScores
from core_rerank_integrations.method.prompt import Span
from core_rerank_integrations.method.scoring import Mass, Scores, document_scores
from core_rerank_integrations.method.windows import Window


class WindowAttention(NamedTuple):
    """The attention mass on the tokens of one prompt.

    Attributes:
        window: The documents of the prompt.
        mass: Attention mass on each token up to the first of the query span, shape
            [weight sets or heads, tokens].
        baseline: Attention mass for the query ``N/A``, same shape.
    """

    window: Window
    mass: Mass
    baseline: Mass

    def scores(self, drop_outliers: bool) -> Scores:
        """Compute the scores of the documents; see `document_scores`.

        Returns:
            Shape [weight sets or heads, documents].
        """
        spans = self.window.prefix.document_spans
        return document_scores(self.mass, self.baseline, spans, drop_outliers)

    def token_scores(self) -> list[TokenScores]:
        """Compute the calibrated mass on the tokens of each document."""
        window, prefix = self.window, self.window.prefix
        calibrated = self.mass.astype(np.float64) - self.baseline
        return [
            TokenScores(passage.start, text, starts, calibrated[..., span.start : span.stop])
            for passage, text, starts, span in zip(
                window.passages,
                window.texts,
                prefix.document_starts,
                prefix.document_spans,
                strict=True,
            )
        ]

    def weighted(self, weights: Mass) -> WindowAttention:
        """Return the weighted sum over heads; ``weights`` has shape [..., heads]."""
        return WindowAttention(self.window, weights @ self.mass, weights @ self.baseline)

    def select(self, index: int) -> WindowAttention:
        """Return the attention of one weight set or head."""
        return WindowAttention(self.window, self.mass[index], self.baseline[index])


class WindowScores(NamedTuple):
    """The scores of the documents of one prompt.

    Attributes:
        scores: Shape [documents].
        tokens: Token scores of each document; empty if they were not requested.
    """

    scores: Scores
    tokens: Sequence[TokenScores] = ()


class ScoredList(NamedTuple):
    """The scores of the documents of one list.

    Attributes:
        scores: Shape [documents]; minus infinity for documents that were not read.
        best_passages: For documents that were read as several passages, the characters of the
            best one; ``None`` for documents that were read whole.
        tokens: Token scores of each document, per passage; empty if they were not requested.
    """

    scores: Scores
    best_passages: list[Span | None]
    tokens: list[list[TokenScores]]


def merge_windows(
    windows: Sequence[Window], scored: Iterable[WindowScores | None], documents: int
) -> ScoredList:
    """Combine the scores of prompts into the scores of their list.

    The score of a document is the score of its best passage.

    Args:
        windows: The windows of the list.
        scored: Scores of each window; ``None`` if it was not read. A document that is not read
            as a whole has no score.
        documents: Number of documents in the list.
    """
    scores = np.full(documents, -np.inf)
    best_passages: list[Span | None] = [None] * documents
    tokens: list[list[TokenScores]] = [[] for _ in range(documents)]
    passages = Counter(index for window in windows for index in window.indices)
    unread: set[int] = set()
    for window_scores, window in zip(scored, windows, strict=True):
        if window_scores is None:
            unread.update(window.indices)
            continue
        for position, (index, passage) in enumerate(
            zip(window.indices, window.passages, strict=True)
        ):
            tokens[index] += window_scores.tokens[position : position + 1]
            if window_scores.scores[position] > scores[index]:
                scores[index] = window_scores.scores[position]
                best_passages[index] = passage if passages[index] > 1 else None
    for index in unread:
        scores[index], best_passages[index], tokens[index] = -np.inf, None, []
    return ScoredList(scores, best_passages, tokens)
