"""A span for every rerank, where tracing is installed: OpenTelemetry's, in OpenInference's words.

Nothing has to be configured here: spans go to the program's own tracer provider, and to nobody
where it has none. What they may show is OpenInference's to say (``OPENINFERENCE_HIDE_INPUTS``).
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
    """A span around one rerank; what is yielded takes its results.

    Args:
        model: Name of the model.
        query: What is asked.
        documents: The candidates.
        top_n: Results that were asked for; ``None`` for all.
    """
    tracer = _tracer()
    if tracer is None:
        yield lambda _: None
        return
    from openinference.instrumentation import Document, get_reranker_attributes

    with tracer.start_as_current_span("rerank", openinference_span_kind="reranker") as span:
        if span.is_recording():
            given = [
                Document(id=str(index), content=document)
                for index, document in enumerate(documents)
            ]
            span.set_attributes(
                get_reranker_attributes(
                    query=query,
                    model_name=model,
                    input_documents=given,
                    top_k=len(documents) if top_n is None else top_n,
                )
            )

        def finish(results: Sequence[RerankResult]) -> None:
            if span.is_recording():
                ranked = [
                    Document(id=str(result.index), content=result.document, score=result.relevance)
                    for result in results
                    if result.reranked
                ]
                span.set_attributes(get_reranker_attributes(output_documents=ranked))

        yield finish


@cache
def _tracer() -> Any:
    """``None`` where OpenInference's instrumentation is not installed."""
    try:
        from openinference.instrumentation import OITracer, TraceConfig
        from opentelemetry import trace
    except ModuleNotFoundError:
        return None
    return OITracer(trace.get_tracer("core_rerank_integrations"), config=TraceConfig())
