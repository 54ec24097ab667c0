"""Fields of the framework adapters: the settings of a reranker and the options of a call."""

from __future__ import annotations

import os
import threading
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails

from core_rerank_integrations._internal.cancellation import run_in_thread
from core_rerank_integrations.errors import CoReError
from core_rerank_integrations.heads.scoring_config import FirstStage
from core_rerank_integrations.method.extraction import ExtractBy
from core_rerank_integrations.remote.reranker import RemoteReranker
from core_rerank_integrations.reranker import CoReReranker
from core_rerank_integrations.results import RerankResults
from core_rerank_integrations.settings import RerankerSettings, RerankOptions, ServerSettings

# Not attributes of the adapters, because a lock can be neither pickled nor copied.
_locks: dict[tuple[int, str], threading.Lock] = {}
"""For each process, because a fork may inherit a lock that is held, and each model."""


Reranker = CoReReranker | RemoteReranker


class ModelFields(RerankerSettings, ServerSettings):
    """The model of an adapter: a `CoReReranker`, which is loaded when it is first needed.

    With ``base_url`` it is a `RemoteReranker` instead. ``reranker`` shares a loaded one of either
    class between adapters. The other fields then have its settings.
    """

    reranker: Reranker | None = Field(
        default=None, exclude=True, repr=False, description="A loaded reranker to share."
    )
    _own_reranker: Reranker | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _take_settings(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or not isinstance(fields.get("reranker"), Reranker):
            return fields
        reranker = fields["reranker"].settings
        if isinstance(reranker, RerankerSettings) and fields.get("base_url") is not None:
            raise ValueError("base_url contradicts the given reranker; leave one of them out")
        settings = dict(reranker)
        for name, value in settings.items():
            if name in fields and fields[name] != value:
                if not type(reranker).model_fields[name].repr:
                    raise ValueError(f"{name} contradicts the given reranker; leave it out")
                raise ValueError(
                    f"{name}={fields[name]!r} contradicts the given reranker, which was made with "
                    f"{name}={value!r}; leave it out"
                )
        return {**fields, **settings}

    @model_validator(mode="after")
    def _check_place(self) -> Self:
        # Saved settings contain those of both, the others with their defaults.
        if self.base_url is None and self.api_key is not None:
            raise ValueError("api_key is for a server: pass its base_url as well")
        for name, field in RerankerSettings.model_fields.items():
            if self.base_url is not None and getattr(self, name) != field.default:
                raise ValueError(
                    f"{name} is for a model in this process, and the server {self.base_url} has "
                    f"chosen its own; leave {name} or base_url out"
                )
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _hide_secrets(cls, fields: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        # Errors show the values of fields, and some show those of all fields.
        try:
            return handler(fields)
        except ValidationError as error:
            raise ValidationError.from_exception_data(
                error.title, [_without_secrets(cls, problem) for problem in error.errors()]
            ) from None

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        state["__dict__"] = {**state["__dict__"], "api_key": None}
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

    @property
    def _model_name(self) -> str:
        """Name of the model for traces; with a server, its address."""
        return self.base_url or str(self.model)

    def _loaded_reranker(self) -> Reranker:
        reranker = self.reranker or self._own_reranker
        if reranker is None:
            settings = {name: getattr(self, name) for name in RerankerSettings.model_fields}
            with _locks.setdefault((os.getpid(), repr(settings)), threading.Lock()):
                reranker = self._own_reranker
                if reranker is None:
                    reranker = self._own_reranker = self._new_reranker(settings)
        return reranker

    def _new_reranker(self, settings: dict[str, Any]) -> Reranker:
        if self.base_url is None:
            return CoReReranker(**settings)
        return RemoteReranker(
            self.base_url, self.api_key, timeout=self.timeout, max_retries=self.max_retries
        )

    async def _aloaded_reranker(self) -> Reranker:
        if (loaded := self.reranker or self._own_reranker) is not None:
            return loaded
        return await run_in_thread(self._loaded_reranker)


def _without_secrets(kind: type[BaseModel], problem: ErrorDetails) -> InitErrorDetails:
    """Return an error without the value that it shows, unless this is that of a public field.

    Errors of this package say the value themselves, if it may be seen.
    """
    details = problem.get("ctx", {})
    field = kind.model_fields.get(str(problem["loc"][0])) if problem["loc"] else None
    is_public = field is not None and field.repr and not isinstance(details.get("error"), CoReError)
    return InitErrorDetails(
        type=problem["type"],
        loc=problem["loc"],
        input=problem["input"] if is_public else "...",
        ctx=details,
    )


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
