"""Checks of the arguments and questions of both chains, and the choice by their thresholds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.integrations.fields import Reranker
from core_rerank_integrations.ranking import check_options, passes
from core_rerank_integrations.remote.reranker import RemoteReranker
from core_rerank_integrations.reranker import CoReReranker
from core_rerank_integrations.results import RerankResults
from core_rerank_integrations.settings import RerankOptions


def checked_reranker(reranker: Reranker | None, options: RerankOptions) -> Reranker:
    """Return the reranker of a chain, the default one if ``None``.

    The heads of a server are not known before it answers; `answering` checks those.

    Raises:
        InvalidInputError: ``score_threshold`` is a number, and the heads are not calibrated.
    """
    reranker = reranker or CoReReranker()
    if not isinstance(reranker, RemoteReranker) and options.score_threshold != "auto":
        check_options(options, reranker.heads.scoring)
    return reranker


def answering(results: RerankResults, options: RerankOptions) -> RerankResults:
    """Choose the results that an answer is drawn from, by ``score_threshold`` and ``top_n``.

    The chains rank without a threshold: a server would refuse one that its heads do not support.

    Args:
        results: The results of all candidates.
        options: Options of the chain. ``"auto"`` keeps all results of heads that do not know a
            list's answerability.

    Raises:
        InvalidInputError: ``score_threshold`` is a number, and the heads are not calibrated.
    """
    threshold = options.score_threshold
    is_number = threshold is not None and threshold != "auto"
    if is_number and any(result.reranked and result.probability is None for result in results):
        raise InvalidInputError(
            f"score_threshold={threshold!r} is a probability, and the heads that ranked are not "
            "calibrated; leave it at 'auto', or use None"
        )
    kept = [result for result in results if passes(result, results.answerable, options)]
    return replace(results, results=tuple(kept[: options.top_n]))


def check_question(question: Any) -> None:
    """Raise unless a question is a string that is not empty.

    Raises:
        InvalidInputError: The question is empty or not a string.
    """
    if not isinstance(question, str) or not question.strip():
        raise InvalidInputError(f"the question must be a text that is not empty, got {question!r}")
