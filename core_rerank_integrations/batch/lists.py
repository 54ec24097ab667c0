"""From lists to results, the same way in this process and on Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from core_rerank_integrations.reranker import CoReReranker
from core_rerank_integrations.results import RerankResult
from core_rerank_integrations.settings import RerankerSettings, RerankOptions

Row = dict[str, Any]
"""A list: ``query``, ``documents`` and, optionally, ``first_stage_scores``, among other columns."""


class ListReranker:
    """Rerank rows of a table with one model, which is loaded at once.

    Args:
        settings: The model and its heads.
        options: Options of each list.
    """

    def __init__(self, settings: RerankerSettings, options: RerankOptions) -> None:
        self._reranker = CoReReranker(**dict(settings))
        self._options = options.model_dump()

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
