"""What the framework adapters have in common: a reranker's settings as pydantic fields."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from core_rerank_integrations.heads.scoring_config import Finite, Ranked
from core_rerank_integrations.method.extraction import ExtractBy
from core_rerank_integrations.reranker import CoReReranker
from core_rerank_integrations.results import RerankResult
from core_rerank_integrations.settings import RerankerSettings

# Not a field: a lock could be neither pickled nor copied, and building is rare.
_building = threading.Lock()


class ModelFields(RerankerSettings):
    """Which model reads documents, and how: a `CoReReranker`, built when it is first needed.

    A ready one may be given as ``reranker`` instead, to share it between adapters; the other
    fields then take its settings.
    """

    reranker: CoReReranker | None = Field(
        default=None, exclude=True, repr=False, description="A ready reranker to share."
    )
    _built: CoReReranker | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _describe_reranker(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or not isinstance(fields.get("reranker"), CoReReranker):
            return fields
        settings = dict(fields["reranker"].settings)
        for name, value in settings.items():
            if name in fields and fields[name] != value:
                raise ValueError(
                    f"{name}={fields[name]!r} contradicts the given reranker, which was made with "
                    f"{name}={value!r}; leave it out"
                )
        return {**fields, **settings}

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        state["__pydantic_private__"] = {"_built": None}
        return state

    def _ready_reranker(self) -> CoReReranker:
        if self.reranker is not None:
            return self.reranker
        with _building:
            if self._built is None:
                self._built = CoReReranker(
                    **{name: getattr(self, name) for name in RerankerSettings.model_fields}
                )
            return self._built


class RerankerFields(ModelFields):
    """The same, and what is to be done with a list."""

    ranked: Ranked = Field(
        default=True,
        description="Whether documents come best first, as retrievers return them: True, or what "
        "ranked them, 'bm25' or 'vectors'. That then counts as the head set says.",
    )
    top_n: int | None = Field(
        default=None, ge=1, description="Most documents to return; None: all."
    )
    score_threshold: Finite | Literal["auto"] | None = Field(
        default=None,
        description="Documents of a lower probability are left out; of a lower score, where the "
        "heads are not calibrated. 'auto': all are, where none of them answers.",
    )
    max_seconds: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Time for reading documents; those that do not get their turn come back behind "
        "the others, marked reranked=False in their metadata and without a score.",
    )
    evidence: bool = Field(
        default=False,
        description="Say in the metadata, as 'evidence', which sentences speak for a document: "
        "[start, stop, score] in its characters, the strongest first.",
    )
    extract: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Cut documents to their strongest sentences, this share of each one's tokens "
        "at most. The metadata says as 'extracted' which characters were kept, [start, stop].",
    )
    extract_by: ExtractBy = Field(
        default="tokens",
        description="What `extract` is a share of: 'tokens', or 'score', which keeps as many "
        "sentences as it takes to hold that share of what all were given.",
    )
    raw_scores: bool = Field(
        default=False,
        description="Hand out the scores that the list is sorted by instead of probabilities.",
    )

    def _rerank(self, query: str, texts: list[str], **changes: Any) -> list[RerankResult]:
        return self._ready_reranker().rerank(query, texts, **self._request(changes))

    async def _arerank(self, query: str, texts: list[str], **changes: Any) -> list[RerankResult]:
        reranker = await asyncio.to_thread(self._ready_reranker)
        return await reranker.arerank(query, texts, **self._request(changes))

    def _request(self, changes: dict[str, Any]) -> dict[str, Any]:
        """What `CoReReranker.rerank` is told besides a query and its documents."""
        return {
            "top_n": self.top_n,
            "score_threshold": self.score_threshold,
            "ranked": self.ranked,
            "max_seconds": self.max_seconds,
            "evidence": self.evidence or self.extract is not None,
            **changes,
        }

    def _evidence_of(self, result: RerankResult) -> dict[str, Any]:
        """What the metadata says of it."""
        if not self.evidence or not result.reranked:
            return {}
        return {"evidence": [[part.start, part.stop, part.score] for part in result.evidence]}

    def _score_of(self, result: RerankResult) -> float:
        """What frameworks get to see as the score."""
        return result.score if self.raw_scores else result.relevance_score
