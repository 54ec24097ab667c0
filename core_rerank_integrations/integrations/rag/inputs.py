"""Checks of the arguments and questions of both chains."""

from __future__ import annotations

from typing import Any

from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.integrations.fields import Reranker
from core_rerank_integrations.ranking import check_options
from core_rerank_integrations.remote.reranker import RemoteReranker
from core_rerank_integrations.reranker import CoReReranker
from core_rerank_integrations.settings import RerankOptions


def with_reranker(
    reranker: Reranker | None, options: RerankOptions
) -> tuple[Reranker, RerankOptions]:
    """Return the reranker of a chain, the default one if ``None``, and the options of its calls.

    ``score_threshold="auto"`` becomes ``None`` if the heads do not know a list's answerability. A
    server checks the options itself, when it is called.

    Raises:
        InvalidInputError: The heads do not support an option.
    """
    reranker = reranker or CoReReranker()
    if isinstance(reranker, RemoteReranker):
        return reranker, options
    if options.score_threshold == "auto" and reranker.heads.scoring.abstention is None:
        options = options.model_copy(update={"score_threshold": None})
    check_options(options, reranker.heads.scoring)
    return reranker, options


def check_question(question: Any) -> None:
    """Raise unless a question is a string that is not empty.

    Raises:
        InvalidInputError: The question is empty or not a string.
    """
    if not isinstance(question, str) or not question.strip():
        raise InvalidInputError(f"the question must be a text that is not empty, got {question!r}")
