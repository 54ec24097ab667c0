"""What the framework adapters have in common: a reranker's settings as pydantic fields."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    field_serializer,
    model_validator,
)

from core_rerank_integrations.heads import HeadSet
from core_rerank_integrations.models import DEFAULT_MODEL
from core_rerank_integrations.prompt import PromptTemplate
from core_rerank_integrations.reranker import CoReReranker
from core_rerank_integrations.results import RerankResult
from core_rerank_integrations.rule import Ranked
from core_rerank_integrations.store import DocumentCache

# Not a field: a lock could be neither pickled nor copied, and building is rare.
_building = threading.Lock()


class ModelFields(BaseModel):
    """Which model reads documents, and how: a `CoReReranker`, built when it is first needed.

    A ready one may be given as ``reranker`` instead, to share it between adapters; the other
    fields then take its settings.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    model: str | Path = Field(
        default=DEFAULT_MODEL, description="Alias, hub id, model folder or GGUF file."
    )
    heads: HeadSet | str | Path | list[tuple[int, int]] | None = Field(
        default=None,
        description="Head set, its shipped name or file, or (layer, head) pairs; "
        "None: the set shipped for the model.",
    )
    backend: str = Field(
        default="auto",
        description="Who runs the model: auto, openvino, transformers, vllm or vllm-shared.",
    )
    dtype: str = Field(default="auto", description="auto, float32, bfloat16, float16 or int8.")
    device: str | None = Field(default=None, description="Torch device; None: CUDA if there.")
    window: int | None = Field(
        default=None, ge=1, description="Most documents per prompt; None: the head set's."
    )
    max_document_tokens: int | None = Field(
        default=None, ge=1, description="Longer documents are cut to this, with a warning."
    )
    document_cache: DocumentCache | None = Field(
        default=None,
        description="How much is kept of documents that were read, in memory and on disk.",
    )
    template: str | PromptTemplate | None = Field(
        default=None, description="Prompt template; None: the head set's."
    )
    engine_args: dict[str, Any] | None = Field(
        default=None, description="Further arguments for vLLM's engine."
    )
    reranker: CoReReranker | None = Field(
        default=None, exclude=True, repr=False, description="A ready reranker to share."
    )
    _built: CoReReranker | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _describe_reranker(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or not isinstance(fields.get("reranker"), CoReReranker):
            return fields
        settings = fields["reranker"].settings
        del settings["engine"], settings["reader"]  # What runs cannot be written down.
        for name, value in settings.items():
            if name in fields and fields[name] != value:
                raise ValueError(
                    f"{name}={fields[name]!r} contradicts the given reranker, which was made with "
                    f"{name}={value!r}; leave it out"
                )
        return {**fields, **settings}

    @field_serializer("model", "heads", mode="wrap")
    def _without_paths(self, value: Any, serialize: SerializerFunctionWrapHandler) -> Any:
        """LlamaIndex writes fields as JSON, which knows no paths."""
        return str(value) if isinstance(value, Path) else serialize(value)

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
                    self.model,
                    heads=self.heads,
                    backend=self.backend,
                    dtype=self.dtype,
                    device=self.device,
                    window=self.window,
                    max_document_tokens=self.max_document_tokens,
                    document_cache=self.document_cache,
                    template=self.template,
                    engine_args=self.engine_args,
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
    score_threshold: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="Documents of a lower probability are left out; "
        "of a lower score, where the heads are not calibrated.",
    )
    max_seconds: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Time for reading documents; those that do not get their turn come back behind "
        "the others, marked reranked=False in their metadata and without a score.",
    )
    raw_scores: bool = Field(
        default=False,
        description="Hand out the scores that the list is sorted by instead of probabilities.",
    )

    def _rerank(
        self, query: str, texts: list[str], first_stage_scores: list[float] | None = None
    ) -> list[RerankResult]:
        return self._ready_reranker().rerank(query, texts, **self._settings(first_stage_scores))

    async def _arerank(
        self, query: str, texts: list[str], first_stage_scores: list[float] | None = None
    ) -> list[RerankResult]:
        reranker = await asyncio.to_thread(self._ready_reranker)
        return await reranker.arerank(query, texts, **self._settings(first_stage_scores))

    def _settings(self, first_stage_scores: list[float] | None) -> dict[str, Any]:
        """What `CoReReranker.rerank` is told besides a query and its documents."""
        return {
            "top_n": self.top_n,
            "score_threshold": self.score_threshold,
            "ranked": self.ranked,
            "first_stage_scores": first_stage_scores,
            "max_seconds": self.max_seconds,
        }

    def _score_of(self, result: RerankResult) -> float:
        """What frameworks get to see as the score."""
        return result.score if self.raw_scores else result.relevance
