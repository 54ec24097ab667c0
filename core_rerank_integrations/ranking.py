"""Ranking: from the scores of a list to its results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.heads.scoring_config import Abstention, ScoringConfig
from core_rerank_integrations.method.evidence import evidence_in
from core_rerank_integrations.method.list_scores import ScoredList
from core_rerank_integrations.method.scoring import best_indices
from core_rerank_integrations.method.windows import Candidates
from core_rerank_integrations.results import RerankResult, RerankResults
from core_rerank_integrations.settings import RerankOptions


def rank(
    candidates: Candidates, scored: ScoredList, scoring: ScoringConfig, options: RerankOptions
) -> RerankResults:
    """Sort the documents of one list, and apply thresholds and ``top_n``.

    Args:
        candidates: The query and its documents.
        scored: Scores of the documents.
        scoring: How the heads rank.
        options: Options of the call, valid for ``scoring``; see `check_options`.
    """
    count = len(candidates.documents)
    scores = scored.scores + scoring.prior(
        count, options.first_stage, candidates.first_stage_scores
    )
    is_read = np.isfinite(scores)
    probabilities: list[float | None] = [None] * count
    if scoring.calibration is not None:
        calibrated = scoring.calibration.probabilities(scored.scores)
        probabilities = [float(calibrated[i]) if is_read[i] else None for i in range(count)]
    answerability = answerable = None
    # A list of which nothing was read says nothing; an empty list answers nothing.
    if scoring.abstention is not None and (is_read.any() or not count):
        answerability = scoring.abstention.answerability(
            [probability for probability in probabilities if probability is not None]
        )
        answerable = answerability >= scoring.abstention.threshold
    results = [
        RerankResult(
            index,
            float(scores[index]),
            candidates.documents[index],
            probabilities[index],
            scored.best_passages[index],
            bool(is_read[index]),
        )
        for index in best_indices(scores, count)
    ]
    kept = [result for result in results if passes(result, answerable, options)]
    kept = kept[: options.top_n]
    if options.evidence:
        kept = [
            replace(result, evidence=evidence_in(result.document, scored.tokens[result.index]))
            for result in kept
        ]
    return RerankResults(tuple(kept), answerability, answerable)


def check_candidates(
    query: str, documents: Sequence[str], first_stage_scores: Sequence[float] | None = None
) -> Candidates:
    """Validate a query and its documents.

    Raises:
        InvalidInputError: The query is empty, ``documents`` is not a list of strings, or
            ``first_stage_scores`` does not hold one finite number per document.
    """
    if not isinstance(query, str):
        raise InvalidInputError(f"the query must be a string, got {type(query).__name__}")
    if not query.strip():
        raise InvalidInputError(f"the query is empty: {query!r}; there is nothing to rank by")
    documents = check_documents(documents)
    if first_stage_scores is None:
        return Candidates(query, documents)
    try:
        scores = np.asarray(first_stage_scores, dtype=np.float64)
    except (TypeError, ValueError):
        scores = np.array(np.nan)
    if scores.shape != (len(documents),) or not np.isfinite(scores).all():
        raise InvalidInputError(
            f"first_stage_scores must be one number for each of the {len(documents)} documents, "
            f"got {first_stage_scores!r}"
        )
    return Candidates(query, documents, scores)


def check_requests(
    requests: Iterable[tuple[str, Sequence[str]]],
    first_stage_scores: Sequence[Sequence[float]] | None,
) -> list[Candidates]:
    """Validate the lists of a batch.

    Raises:
        InvalidInputError: A query, a list of documents or their scores are invalid, see
            `check_candidates`; or there is not one list of scores per request.
    """
    pairs = list(requests)
    scores = [None] * len(pairs) if first_stage_scores is None else first_stage_scores
    if len(scores) != len(pairs):
        raise InvalidInputError(
            f"first_stage_scores must be one list for each of the {len(pairs)} requests, got "
            f"{len(scores)}"
        )
    return [
        check_candidates(query, documents, own)
        for (query, documents), own in zip(pairs, scores, strict=True)
    ]


def check_documents(documents: Any) -> tuple[str, ...]:
    """Validate a list of documents.

    Raises:
        InvalidInputError: ``documents`` is not a list of strings.
    """
    if isinstance(documents, str) or not isinstance(documents, Sequence):
        raise InvalidInputError(
            f"documents must be a list of strings, got {type(documents).__name__}"
        )
    for index, document in enumerate(documents):
        if not isinstance(document, str):
            raise InvalidInputError(
                f"document {index} must be a string, got {type(document).__name__}"
            )
    return tuple(documents)


def check_options(options: RerankOptions, scoring: ScoringConfig) -> None:
    """Check that the head set supports the options.

    Raises:
        InvalidInputError: ``score_threshold`` is set and the heads are not calibrated, or it is
            ``"auto"`` and they have no abstention.
    """
    if options.score_threshold == "auto":
        check_abstention(scoring)
    elif options.score_threshold is not None and scoring.calibration is None:
        raise InvalidInputError(
            f"score_threshold={options.score_threshold!r} is a probability, and these heads are "
            "not calibrated; use min_score for a minimum score"
        )


def check_abstention(scoring: ScoringConfig) -> Abstention:
    """Return the model of a list's answerability.

    Raises:
        InvalidInputError: The head set has none.
    """
    if scoring.abstention is None:
        raise InvalidInputError(
            "these heads cannot tell whether a list holds a relevant document: use the default "
            "heads with one document per prompt, or fit it with `core-rerank heads abstention`"
        )
    return scoring.abstention


def passes(result: RerankResult, answerable: bool | None, options: RerankOptions) -> bool:
    """Return whether a result reaches the thresholds of a call, or was not read.

    Args:
        result: The result.
        answerable: Whether its list is answerable; ``None`` if that is not known.
        options: Options of the call.
    """
    if not result.reranked:
        return True
    if options.min_score is not None and result.score < options.min_score:
        return False
    if options.score_threshold is None:
        return True
    if options.score_threshold == "auto":
        return answerable is not False
    return result.probability is not None and result.probability >= options.score_threshold
