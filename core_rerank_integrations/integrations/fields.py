"""Fields of the framework adapters: the settings of a reranker and the options of a call."""

from __future__ import annotations

import os
import threading
from typing import Annotated, Any

from pydantic import ConfigDict, Field, PrivateAttr, model_validator

from core_rerank_integrations._internal.cancellation import run_in_thread
from core_rerank_integrations.heads.scoring_config import FirstStage
from core_rerank_integrations.method.extraction import ExtractBy
from core_rerank_integrations.reranker import CoReReranker
from core_rerank_integrations.results import RerankResults
from core_rerank_integrations.settings import RerankerSettings, RerankOptions

# Not attributes of the adapters, because a lock can be neither pickled nor copied.
_locks: dict[tuple[int, str], threading.Lock] = {}
"""For each process, because a fork may inherit a lock that is held, and each model."""


class ModelFields(RerankerSettings):
    """The model of an adapter: a `CoReReranker`, which is loaded when it is first needed.

    ``reranker`` shares a loaded one between adapters. The other fields then have its settings.
    """

    reranker: CoReReranker | None = Field(
        default=None, exclude=True, repr=False, description="A loaded reranker to share."
    )
    _own_reranker: CoReReranker | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _take_settings(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or not isinstance(fields.get("reranker"), CoReReranker):
            return fields
        settings = dict(fields["reranker"].settings)
        for name, value in settings.items():
            if name in fields and fields[name] != value:
                if not RerankerSettings.model_fields[name].repr:
                    raise ValueError(f"{name} contradicts the given reranker; leave it out")
                raise ValueError(
                    f"{name}={fields[name]!r} contradicts the given reranker, which was made with "
                    f"{name}={value!r}; leave it out"
                )
        return {**fields, **settings}

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        state["__pydantic_private__"] = {"_own_reranker": None}
        return state

    def close(self) -> None:
        """Free the model that this object has loaded; a later call loads it again.

        A shared ``reranker`` stays open. Copies of this object that share its model are closed too.
        """
        reranker, self._own_reranker = self._own_reranker, None
        if reranker is not None:
            reranker.close()

    async def aclose(self) -> None:
        """Free the model without blocking the event loop; see `close`."""
        await run_in_thread(self.close)

    def _loaded_reranker(self) -> CoReReranker:
        reranker = self.reranker or self._own_reranker
        if reranker is None:
            settings = {name: getattr(self, name) for name in RerankerSettings.model_fields}
            with _locks.setdefault((os.getpid(), repr(settings)), threading.Lock()):
                reranker = self._own_reranker
                if reranker is None:
                    reranker = self._own_reranker = CoReReranker(**settings)
        return reranker

    async def _aloaded_reranker(self) -> CoReReranker:
        if (loaded := self.reranker or self._own_reranker) is not None:
            return loaded
        return await run_in_thread(self._loaded_reranker)


class RerankerFields(ModelFields, RerankOptions):
    """The model of an adapter, the options of its calls, and the form of its results."""

    model_config = ConfigDict(frozen=False)

    first_stage: FirstStage | None = Field(
        default="other",
        description="What ordered the documents, best first: bm25, dense (embeddings) or other. "
        "The order then counts as much as the head set says. None if nothing ordered them.",
    )
    extract: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="Cut each document to its best sentences, at most this share of its tokens.",
    )
    extract_by: ExtractBy = Field(
        default="tokens",
        description="Whether `extract` is a share of the tokens, or of the score of all sentences.",
    )

    def _rerank(self, query: str, texts: list[str], **changes: Any) -> RerankResults:
        return self._loaded_reranker().rerank(query, texts, **self._options(changes))

    async def _arerank(self, query: str, texts: list[str], **changes: Any) -> RerankResults:
        reranker = await self._aloaded_reranker()
        return await reranker.arerank(query, texts, **self._options(changes))

    def _options(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments of a rerank."""
        options = {name: getattr(self, name) for name in RerankOptions.model_fields}
        options["evidence"] = self.evidence or self.extract is not None
        return options | changes
