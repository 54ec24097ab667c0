"""From results and errors to replies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, TypeAdapter

from core_rerank_integrations import __version__
from core_rerank_integrations.errors import requires_extra
from core_rerank_integrations.heads.head_set import HeadSet
from core_rerank_integrations.method.evidence import Evidence
from core_rerank_integrations.results import RerankResult, RerankResults
from core_rerank_integrations.serving.dialects import (
    Details,
    Document,
    ErrorDetails,
    ErrorReply,
    ListDetails,
    RelevantSpans,
    RerankReply,
    RerankRequest,
    Result,
    Span,
    TEIErrorReply,
    TEIRequest,
    TEIResult,
    Usage,
    VoyageReply,
    VoyageResult,
)
from core_rerank_integrations.serving.queue import RankedList

with requires_extra("server"):
    from starlette.responses import Response

RETRY_SECONDS = 1
"""When a client may try again what the server has no room for, or cannot answer yet."""

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_TEI_TYPES = {429: "Overloaded", 500: "Backend", 503: "Unhealthy", 504: "Overloaded"}
_TEI_RESULTS = TypeAdapter(list[TEIResult])


def error_reply(status: int, message: str, *, for_tei: bool = False) -> Response:
    """Return an error in the shape that a client reads.

    Args:
        status: Status of the reply.
        message: What is wrong, and what helps.
        for_tei: Whether the client is one of Text Embeddings Inference.
    """
    reply: BaseModel
    if for_tei:
        status = 424 if status == 500 else status
        reply = TEIErrorReply(
            error=message, error_type=_TEI_TYPES.get(500 if status == 424 else status, "Validation")
        )
    else:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        details = ErrorDetails(message=message, type=_TYPES.get(status, kind), code=status)
        reply = ErrorReply(error=details, message=message, detail=message)
    headers = {}
    if status in (429, 503):
        headers["Retry-After"] = str(RETRY_SECONDS)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_reply(reply, status, headers)


def json_reply(
    reply: BaseModel, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """Return a reply as JSON, without the fields that were not requested."""
    content = reply.model_dump_json(exclude_unset=True)
    return Response(content, status, headers, media_type="application/json")


def rerank_reply(
    name: str,
    request: RerankRequest,
    ranked: RankedList,
    model: str,
    heads: HeadSet,
) -> Response:
    """Return results to clients of Cohere, Jina and vLLM.

    Args:
        name: Name of the reply.
        request: The request.
        ranked: Its results.
        model: Name of the model.
        heads: The heads it reads.
    """
    results, tokens, truncated = ranked
    shown = _relevance_scores(results)
    meta: dict[str, Any] = {"api_version": {"version": "2"}, "tokens": {"input_tokens": tokens}}
    if truncated:
        meta["warnings"] = [
            f"documents {truncated} were truncated, and their ends were not ranked: split them, or "
            "raise the limit (max_tokens_per_doc of the request, max_document_tokens of the server)"
        ]
    return json_reply(
        RerankReply(
            id=name,
            model=model,
            object="list",
            usage=Usage(prompt_tokens=tokens, total_tokens=tokens),
            meta=meta,
            results=[
                _result(result, score, request)
                for result, score in zip(results, shown, strict=True)
            ],
            core_rerank=ListDetails(
                answerability=results.answerability,
                answerable=results.answerable,
                heads=heads.name,
                version=__version__,
            ),
        )
    )


def voyage_reply(
    request: RerankRequest, results: RerankResults, tokens: int, model: str
) -> Response:
    """Return results to Voyage's client.

    Args:
        request: The request.
        results: Its results.
        tokens: Number of tokens of its prompts.
        model: Name of the model.
    """
    found = [
        VoyageResult(index=result.index, relevance_score=score)
        for result, score in zip(results, _relevance_scores(results), strict=True)
    ]
    if request.return_documents:
        for result in found:
            result.document = text_of(request.documents[result.index])
    usage = Usage(prompt_tokens=tokens, total_tokens=tokens)
    return json_reply(VoyageReply(object="list", data=found, model=model, usage=usage))


def tei_reply(request: TEIRequest, results: RerankResults) -> Response:
    """Return results to clients of Text Embeddings Inference, a bare list."""
    found = [
        TEIResult(index=result.index, score=result.score if request.raw_scores else score)
        for result, score in zip(results, _relevance_scores(results), strict=True)
    ]
    if request.return_text:
        for result in found:
            result.text = request.texts[result.index]
    content = _TEI_RESULTS.dump_json(found, exclude_unset=True)
    return Response(content, media_type="application/json")


def wants_spans(request: RerankRequest) -> bool:
    """Return whether a request asks for the relevant spans of its documents."""
    return request.relevant_spans is not None and request.relevant_spans.mode == "enabled"


def text_of(document: str | Document) -> str:
    """Return the text that is ranked."""
    return document if isinstance(document, str) else document.text


def _result(result: RerankResult, score: float, request: RerankRequest) -> Result:
    details = Details(
        score=result.score if result.reranked else None,
        probability=result.probability,
        reranked=result.reranked,
        best_passage=result.best_passage,
    )
    if request.evidence:
        details.evidence = list(result.evidence)
    reply = Result(index=result.index, relevance_score=score, core_rerank=details)
    if request.return_documents:
        document = request.documents[result.index]
        reply.document = Document(text=document) if isinstance(document, str) else document
    if wants_spans(request):
        assert request.relevant_spans is not None
        reply.relevant_spans = _spans(result.evidence, request.relevant_spans)
    return reply


def _spans(evidence: Sequence[Evidence], wanted: RelevantSpans) -> list[Span]:
    """Return the best sentences; their scores are shares, so that a threshold has a scale.

    Sentences with a negative score are left out, unless all are: then the best one counts alone.
    """
    positive = [part for part in evidence if part.score > 0]
    total = sum(part.score for part in positive)
    spans = [
        Span(start=part.start, end=part.stop, score=part.score / total) for part in positive
    ] or [Span(start=part.start, end=part.stop, score=1.0) for part in evidence[:1]]
    if wanted.threshold is not None:
        spans = [span for span in spans if span.score >= wanted.threshold]
    return spans[: wanted.max_spans]


def _relevance_scores(results: RerankResults) -> list[float]:
    """Return the scores that clients sort by. JSON has no infinity for documents not read."""
    read = [result.relevance_score for result in results if result.reranked]
    lowest = min([0.0, *read])
    return [result.relevance_score if result.reranked else lowest for result in results]
