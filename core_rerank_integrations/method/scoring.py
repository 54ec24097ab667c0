"""Document scores from attention mass: the calibration of arXiv 2510.02219."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from core_rerank_integrations.method.prompt import Span

Mass = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float64]

OUTLIER_DEVIATIONS = 2.0
EQUAL_DEVIATION = 1e-9
"""Scores that deviate by less, as a share of the largest, are equal but for rounding."""


def document_scores(
    query_mass: Mass,
    baseline_mass: Mass,
    document_spans: Sequence[Span],
    drop_outliers: bool = True,
) -> Scores:
    """Compute the calibrated score of every document of one prompt.

    For each token, ``c = mass(query) - mass("N/A")``. Tokens of a document whose ``c`` is at most
    that document's mean minus two (unbiased) standard deviations are dropped; the score is the
    sum of the rest (arXiv 2510.02219, section 3, and the authors' implementation). A document
    of a single token has no deviation and keeps it.

    Args:
        query_mass: Attention mass on each prompt token, shape [..., tokens]. Each index of the
            leading dimensions, such as heads, is scored separately.
        baseline_mass: Attention mass for the query ``N/A``, shape [..., tokens]. Both must reach
            the end of the last document's span.
        document_spans: Token spans of the documents.
        drop_outliers: ``False`` sums all tokens, which makes the score linear in the heads.

    Returns:
        Scores in the order of ``document_spans``, shape [..., documents].
    """
    end = max(span.stop for span in document_spans)
    calibrated = query_mass[..., :end].astype(np.float64) - baseline_mass[..., :end]
    documents: Iterable[npt.NDArray[np.float64]] = (
        calibrated[..., span.start : span.stop] for span in document_spans
    )
    if drop_outliers:
        documents = map(_without_outliers, documents)
    return np.stack([tokens.sum(axis=-1) for tokens in documents], axis=-1)


def rank_prior(count: int, weight: float) -> Scores:
    """Compute what a first stage's order adds to the scores of its documents.

    ``-weight * ln(rank)``: in a softmax over the candidates, this prior makes the probability of
    a rank proportional to ``rank ** -weight``.

    Args:
        count: Number of documents, best first.
        weight: Weight of the order.

    Returns:
        Shape [documents].
    """
    prior: Scores = -weight * np.log(np.arange(1, count + 1))
    return prior


def score_prior(first_stage_scores: npt.ArrayLike, weight: float) -> Scores:
    """Compute what a first stage's own scores add: ``weight`` times their z-scores.

    Scores that are all equal, or differ by rounding alone, add nothing.

    Args:
        first_stage_scores: Higher is better, shape [documents].
        weight: Weight of one standard deviation.

    Returns:
        Shape [documents].
    """
    scores = np.asarray(first_stage_scores, dtype=np.float64)
    largest = np.abs(scores).max(initial=0.0)
    if largest < np.finfo(np.float64).tiny:
        return np.zeros(len(scores))
    scores = scores / largest  # The squares of large scores would overflow.
    deviation = scores.std()
    if deviation < EQUAL_DEVIATION:
        return np.zeros(len(scores))
    z_scores: Scores = (scores - scores.mean()) / deviation
    return weight * z_scores


def best_indices(scores: Scores, count: int) -> list[int]:
    """Return the indices of the ``count`` highest scores, best first; ties keep their order."""
    indices: list[int] = np.argsort(-scores, kind="stable")[:count].tolist()
    return indices


def _without_outliers(tokens: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    if tokens.shape[-1] == 1:
        return tokens
    deviation = tokens.std(axis=-1, ddof=1, keepdims=True)
    floor = tokens.mean(axis=-1, keepdims=True) - OUTLIER_DEVIATIONS * deviation
    return np.where((tokens > floor) | (deviation == 0), tokens, 0.0)
