"""OpenTelemetry spans of reranks, with OpenInference's attributes, if it is installed.

Spans go to the program's tracer provider. OpenInference's own settings, such as
``OPENINFERENCE_HIDE_INPUTS``, decide what they contain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from core_rerank_integrations.results import RerankResult

Finish = Callable[[Sequence[RerankResult]], None]


@contextmanager
def rerank_span(
    model: str, query: str, documents: Sequence[str], top_n: int | None
) -> Iterator[Finish]:
    """Open a span around one rerank.

    Args:
        model: Name of the model.
        query: The query.
        documents: Texts of the documents.
        top_n: Number of requested results; ``None`` for all.

    Yields:
        A function that adds the results to the span.
    """
    tracer = _tracer()
    if tracer is None:
        yield lambda _: None
        return
    from openinference.instrumentation import Document, get_reranker_attributes

    with tracer.start_as_current_span("rerank", openinference_span_kind="reranker") as span:
        if span.is_recording():
            inputs = [
                Document(id=str(index), content=document)
                for index, document in enumerate(documents)
            ]
            span.set_attributes(
                get_reranker_attributes(
                    query=query,
                    model_name=model,
                    input_documents=inputs,
                    top_k=len(documents) if top_n is None else top_n,
                )
            )

        def finish(results: Sequence[RerankResult]) -> None:
            if span.is_recording():
                ranked = [
                    Document(
                        id=str(result.index), content=result.document, score=result.relevance_score
                    )
                    for result in results
                    if result.reranked
                ]
                span.set_attributes(get_reranker_attributes(output_documents=ranked))

        yield finish


@cache
def _tracer() -> Any:
    """Return a tracer, or ``None`` if OpenInference's instrumentation is not installed."""
    try:
        from openinference.instrumentation import OITracer, TraceConfig
        from opentelemetry import trace
    except ModuleNotFoundError:
        return None
    return OITracer(trace.get_tracer("core_rerank_integrations"), config=TraceConfig())
