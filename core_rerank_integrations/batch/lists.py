"""From lists to results, the same way in this process and on Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.ranking import check_candidates
from core_rerank_integrations.reranker import CoReReranker
from core_rerank_integrations.results import RerankResult
from core_rerank_integrations.settings import RerankerSettings, RerankOptions

Row = dict[str, Any]
"""A list: ``query``, ``documents`` and, optionally, ``first_stage_scores``, among other columns. An
``id`` names it in errors."""

MAX_NAME = 80
"""Number of characters of a row's name in an error."""


class ListReranker:
    """Rerank rows of a table with one model, which is loaded at once.

    Args:
        settings: The model and its heads.
        options: Options of each list.
    """

    def __init__(self, settings: RerankerSettings, options: RerankOptions) -> None:
        self._reranker = CoReReranker(**dict(settings))
        self._options = options.model_dump()

    def check(self, rows: Sequence[Row]) -> None:
        """Check the queries of rows, before any document is read.

        Raises:
            InvalidInputError: A query is empty or too long; the message names its row.
        """
        settings, scorer = self._reranker.settings, self._reranker.scorer
        layout = self._reranker.heads.scoring.layout(
            settings.max_document_tokens, settings.max_query_tokens
        )
        for row in rows:
            try:
                scorer.plan([check_candidates(row["query"], [""])], layout)
            except InvalidInputError as error:
                name = str(row.get("id", row["query"]))[:MAX_NAME]
                raise InvalidInputError(f"query {name!r}: {error}") from error

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows with ``results`` and ``answerability``.

        Raises:
            InvalidInputError: A query is empty or too long, or an option does not suit the heads.
        """
        has_scores = bool(rows) and "first_stage_scores" in rows[0]
        lists = self._reranker.rerank_batch(
            [(row["query"], row["documents"]) for row in rows],
            first_stage_scores=[row["first_stage_scores"] for row in rows] if has_scores else None,
            **self._options,
        )
        return [
            row | {"results": list(map(_fields, found)), "answerability": found.answerability}
            for row, found in zip(rows, lists, strict=True)
        ]

    def close(self) -> None:
        """Free the model."""
        self._reranker.close()


def _fields(result: RerankResult) -> Row:
    """Return a result without its document, which the row holds already."""
    return {
        "index": result.index,
        "score": result.score,
        "probability": result.probability,
        "reranked": result.reranked,
        "best_passage": result.best_passage,
        "evidence": [
            {"start": part.start, "stop": part.stop, "score": part.score}
            for part in result.evidence
        ],
    }
