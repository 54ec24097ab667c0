"""From attention mass to document scores: the calibration of arXiv 2510.02219, in numpy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from core_rerank_integrations.prompt import Span

Mass = npt.NDArray[np.float32]

Scores = npt.NDArray[np.float64]

OUTLIER_DEVIATIONS = 2.0


def document_scores(
    query_mass: Mass,
    baseline_mass: Mass,
    document_spans: Sequence[Span],
    drop_outliers: bool = True,
) -> Scores:
    """Calibrated score of every document of one prompt.

    Per token, ``c = mass(query) - mass("N/A")``. Tokens of a document whose ``c`` is at most
    that document's mean minus two (unbiased) standard deviations are dropped; the score is the
    sum of the rest (arXiv 2510.02219, section 3, and the authors' implementation). A document
    of a single token has no deviation and keeps it.

    Args:
        query_mass: Attention mass per prompt token, shape [..., tokens]; leading dimensions,
            such as heads, are scored each by itself.
        baseline_mass: The same for the baseline, which asks ``N/A``, shape [..., tokens]. Both
            must reach the end of the last document's span.
        document_spans: Token spans of the documents.
        drop_outliers: ``False`` sums all tokens, which makes the score linear in the heads.

    Returns:
        Shape [..., documents], in the order of ``document_spans``.
    """
    end = max(span.stop for span in document_spans)
    calibrated = query_mass[..., :end].astype(np.float64) - baseline_mass[..., :end]
    documents: Iterable[npt.NDArray[np.float64]] = (
        calibrated[..., span.start : span.stop] for span in document_spans
    )
    if drop_outliers:
        documents = map(_without_outliers, documents)
    return np.stack([tokens.sum(axis=-1) for tokens in documents], axis=-1)


def prior_of_order(count: int, weight: float) -> Scores:
    """What a first stage's order adds to the scores of its ``count`` documents, best first.

    ``-weight * ln(rank)``: in a softmax over the candidates, a prior by which the relevant one
    stands at a rank with a probability proportional to ``rank ** -weight``.
    """
    prior: Scores = -weight * np.log(np.arange(1, count + 1))
    return prior


def prior_of_scores(first_stage: npt.ArrayLike, weight: float) -> Scores:
    """What a first stage's own scores add: ``weight`` times how far each is from their mean.

    Measured in their standard deviation, so that it does not matter what they are scores of;
    scores that are all the same add nothing.

    Args:
        first_stage: Higher is better; shape [documents].
        weight: How much they count.
    """
    given = np.asarray(first_stage, dtype=np.float64)
    distance = given - given.mean()
    deviation = given.std()
    return weight * distance / deviation if deviation else np.zeros(len(given))


def best_places(scores: Scores, count: int) -> list[int]:
    """Where the ``count`` highest scores stand, best first; ties keep their order."""
    places: list[int] = np.argsort(-scores, kind="stable")[:count].tolist()
    return places


def _without_outliers(tokens: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    if tokens.shape[-1] == 1:
        return tokens
    deviation = tokens.std(axis=-1, ddof=1, keepdims=True)
    floor = tokens.mean(axis=-1, keepdims=True) - OUTLIER_DEVIATIONS * deviation
    return np.where((tokens > floor) | (deviation == 0), tokens, 0.0)
