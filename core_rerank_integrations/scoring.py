"""From attention mass to document scores: the calibration of arXiv 2510.02219, in numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from core_rerank_integrations.prompt import Span

Mass = npt.NDArray[np.float32]

OUTLIER_DEVIATIONS = 2.0


def document_scores(
    query_mass: Mass, baseline_mass: Mass, document_spans: Sequence[Span]
) -> list[float]:
    """Calibrated score of every document of one prompt.

    Per token, ``c = mass(query) - mass("N/A")``. Tokens of a document whose ``c`` is at most
    that document's mean minus two (unbiased) standard deviations are dropped; the score is the
    sum of the rest (arXiv 2510.02219, section 3, and the authors' implementation). A document
    of a single token has no deviation and keeps it.

    Args:
        query_mass: Attention mass per prompt token, shape [tokens].
        baseline_mass: The same for the twin prompt that asks ``N/A``, shape [tokens]. Both
            must reach the end of the last document's span.
        document_spans: Token spans of the documents.

    Returns:
        One score per span, in the order of ``document_spans``.
    """
    end = max(span.stop for span in document_spans)
    calibrated = query_mass[:end].astype(np.float64) - baseline_mass[:end]
    return [_document_score(calibrated[span.start : span.stop]) for span in document_spans]


def _document_score(tokens: npt.NDArray[np.float64]) -> float:
    deviation = tokens.std(ddof=1) if len(tokens) > 1 else 0.0
    if deviation > 0:
        tokens = tokens[tokens > tokens.mean() - OUTLIER_DEVIATIONS * deviation]
    return float(tokens.sum())
