"""What a call is told, looked at before the model runs: errors name the value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.reading import Candidates
from core_rerank_integrations.rule import Abstention, RankingRule, Threshold
from core_rerank_integrations.scoring import Scores


def check_count(name: str, count: Any) -> None:
    """Refuse what is neither a whole number from 1 on nor ``None``.

    Raises:
        InvalidInputError: It is not.
    """
    is_whole = isinstance(count, int) and not isinstance(count, bool)
    if count is not None and not (is_whole and count >= 1):
        raise InvalidInputError(f"{name} must be at least 1, or None, got {count!r}")


def check_request(request: tuple[str, Sequence[str]]) -> Candidates:
    """A query and its documents.

    Raises:
        InvalidInputError: The query is empty, or one of them is no string.
    """
    query, documents = request
    if not isinstance(query, str):
        raise InvalidInputError(f"the query must be a string, got {type(query).__name__}")
    if not query.strip():
        raise InvalidInputError(f"the query is empty: {query!r}; there is nothing to rank by")
    return Candidates(query, check_documents(documents))


def check_documents(documents: Sequence[str]) -> tuple[str, ...]:
    """The documents, if they are a list of strings.

    Raises:
        InvalidInputError: They are not.
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


def check_scores(scores: Sequence[float], count: int) -> Scores:
    """A first stage's scores, shape [``count``].

    Raises:
        InvalidInputError: They are not one number for each document.
    """
    try:
        given = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError):
        given = np.array(np.nan)
    if given.shape != (count,) or not np.isfinite(given).all():
        raise InvalidInputError(
            f"first_stage_scores must be one number for each of the {count} documents, "
            f"got {scores!r}"
        )
    return given


def check_seconds(seconds: float | None) -> None:
    """Refuse what is no time budget.

    Raises:
        InvalidInputError: It is neither a number above 0 nor ``None``.
    """
    if seconds is None:
        return
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not (is_number and 0 < seconds < math.inf):
        raise InvalidInputError(
            f"max_seconds must be a number of seconds above 0, or None, got {seconds!r}"
        )


def check_threshold(threshold: Threshold, rule: RankingRule) -> None:
    """Refuse what is no threshold for results of this rule.

    Raises:
        InvalidInputError: It is neither a number, nor ``"auto"``, nor ``None``; it is no
            probability where the rule has such; or it is ``"auto"`` where the rule knows none.
    """
    if threshold is None:
        return
    if threshold == "auto":
        check_abstention(rule)
        return
    is_number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if not is_number or math.isnan(threshold):
        raise InvalidInputError(
            f"score_threshold must be a number, 'auto' or None, got {threshold!r}"
        )
    if rule.calibration is not None and not 0 <= threshold <= 1:
        raise InvalidInputError(
            f"score_threshold is a probability between 0 and 1, got {threshold!r}"
        )


def check_abstention(rule: RankingRule) -> Abstention:
    """When a list is said to hold nothing relevant.

    Raises:
        InvalidInputError: The rule does not know.
    """
    if rule.abstention is None:
        raise InvalidInputError(
            "these heads do not know when nothing in a list is relevant: take the default ones in "
            "prompts of one document, or fit it with `core-rerank heads abstention`"
        )
    return rule.abstention
