"""Requests and replies, field by field.

Three dialects are one: a reply has the fields that clients of Cohere, Jina and vLLM read. Text
Embeddings Inference differs, and is told apart by ``texts``. Voyage's replies differ too, and its
requests are told apart by ``top_k``. Fields that a dialect has and this server does not know are
ignored. ``null`` means the default.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from core_rerank_integrations.heads.scoring_config import Count, Finite, Probability
from core_rerank_integrations.method.evidence import Evidence
from core_rerank_integrations.settings import RerankOptions

T = TypeVar("T")

Items = Annotated[list[T], Field(fail_fast=True)]
"""A list of which only the first wrong item is an error: a body may hold millions of them."""


def without_nulls(fields: Any) -> Any:
    """Return the fields that are not ``null``, and ``top_k``, which tells Voyage's client."""
    if not isinstance(fields, dict):
        return fields
    return {name: value for name, value in fields.items() if value is not None or name == "top_k"}


class _Request(BaseModel):
    model_config = ConfigDict(extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, fields: Any) -> Any:
        return without_nulls(fields)


class Document(BaseModel):
    """A document with further fields, which the reply gives back."""

    model_config = ConfigDict(extra="allow")

    text: str


class RelevantSpans(_Request):
    """Which spans of each document are wanted, as in Cohere's API."""

    mode: Literal["enabled", "disabled"] = "enabled"
    threshold: Probability | None = Field(
        default=None, description="Minimum score of a span, from 0 to 1."
    )
    max_spans: Count | None = Field(
        default=None, description="Maximum number of spans of a document."
    )


TopN = Annotated[int, Field(ge=0)] | None
"""Maximum number of results; ``None`` and 0 stand for all."""


class RerankRequest(RerankOptions):
    """A request of Cohere's, Jina's, vLLM's and Voyage's clients, with the options of a rerank."""

    model_config = ConfigDict(extra="ignore")

    query: str
    documents: Items[str | Document]
    model: str | None = Field(default=None, description="Ignored: the server has one model.")
    top_n: TopN = Field(
        default=None, description="Maximum number of results; by default, and with 0, all."
    )
    top_k: TopN = Field(
        default=None,
        description="Voyage's name of top_n. The reply then has Voyage's shape, also with null.",
    )
    return_documents: bool = Field(
        default=True, description="Whether results contain their documents."
    )
    max_tokens_per_doc: Count | None = Field(
        default=None,
        validation_alias=AliasChoices("max_tokens_per_doc", "max_doc_length"),
        description="Longer documents are truncated to this number of tokens.",
    )
    relevant_spans: RelevantSpans | None = None
    first_stage_scores: Items[Finite] | None = Field(
        default=None, description="The first stage's score of each document."
    )

    @property
    def is_from_voyage(self) -> bool:
        """Whether Voyage's client has sent it, which always names ``top_k``."""
        return "top_k" in self.model_fields_set

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, fields: Any) -> Any:
        return without_nulls(fields)


class TEIRequest(_Request):
    """A request of clients of Text Embeddings Inference."""

    query: str
    texts: Items[str]
    top_n: TopN = Field(
        default=None,
        description="Maximum number of results, as in llama.cpp; by default, and with 0, all.",
    )
    raw_scores: bool = Field(
        default=False, description="Whether scores are attention mass instead of probabilities."
    )
    return_text: bool = Field(default=False, description="Whether results contain their texts.")
    truncate: bool = Field(
        default=False, description="Ignored: long texts are read as several passages."
    )


def _dialect(body: Any) -> str:
    return "tei" if is_tei(body) else "rerank"


def is_tei(body: Any) -> bool:
    """Return whether a client of Text Embeddings Inference has sent a body."""
    return isinstance(body, TEIRequest) or (
        isinstance(body, dict) and body.get("texts") is not None
    )


AnyRequest = Annotated[
    Annotated[RerankRequest, Tag("rerank")] | Annotated[TEIRequest, Tag("tei")],
    Discriminator(_dialect),
]


class DocumentsRequest(_Request):
    """Documents to read before a question is asked."""

    documents: Items[str | Document]


class Span(BaseModel):
    """A sentence of a document, in code points; the score is its share of the document's."""

    start: int
    end: int
    score: float


class Details(BaseModel):
    """What this server says about a result beyond the dialects."""

    score: float | None = Field(
        description="By which the list is sorted; null if the document was not read."
    )
    probability: float | None
    reranked: bool
    best_passage: tuple[int, int] | None
    evidence: list[Evidence] = Field(
        default=[],
        description="Start, end and score of each sentence, if requested, then those of its words, "
        "and its number of tokens.",
    )


class Result(BaseModel):
    """A document's place in the ranking."""

    index: int
    relevance_score: float
    document: Document | None = None
    relevant_spans: list[Span] = []
    core_rerank: Details


class Usage(BaseModel):
    """Number of tokens of all prompts, whether they were known or not."""

    prompt_tokens: int
    total_tokens: int


class ListDetails(BaseModel):
    """What this server says about a list beyond the dialects."""

    answerability: float | None
    answerable: bool | None
    heads: str
    version: str


class RerankReply(BaseModel):
    """The results of a list, best first."""

    id: str
    model: str
    object: Literal["list"] = "list"
    usage: Usage
    meta: dict[str, Any]
    results: list[Result]
    core_rerank: ListDetails


class VoyageResult(BaseModel):
    """A document's place in the ranking, as Voyage's client reads it."""

    index: int
    relevance_score: float
    document: str | None = None


class VoyageReply(BaseModel):
    """The results of a list, best first, as Voyage's client reads them."""

    object: Literal["list"] = "list"
    data: list[VoyageResult]
    model: str
    usage: Usage


class TEIResult(BaseModel):
    """A text's place in the ranking."""

    index: int
    score: float
    text: str | None = None


class DocumentsReply(BaseModel):
    """What reading documents ahead has written."""

    cached: int
    bytes_written: int


class ModelCard(BaseModel):
    """A model, as OpenAI's clients read it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    """The models of this server: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetails(BaseModel):
    """An error, as OpenAI's clients read it."""

    message: str
    type: str
    code: int


class ErrorReply(BaseModel):
    """An error: Cohere's clients read ``message``, Jina's ``detail``."""

    error: ErrorDetails
    message: str
    detail: str


class TEIErrorReply(BaseModel):
    """An error, as clients of Text Embeddings Inference read it."""

    error: str
    error_type: str
