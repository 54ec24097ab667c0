"""OpenTelemetry spans of reranks, with OpenInference's attributes, if it is installed.

Spans go to the program's tracer provider. OpenInference's own settings, such as
``OPENINFERENCE_HIDE_INPUTS``, decide what they contain.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any

from core_rerank_integrations.method.windows import Candidates
from core_rerank_integrations.results import RerankResult

Finish = Callable[[Sequence[Sequence[RerankResult]]], None]


@contextmanager
def rerank_spans(model: str, lists: Sequence[Candidates], top_n: int | None) -> Iterator[Finish]:
    """Open a span for each list of a rerank, below the caller's span or its run in LangChain.

    Args:
        model: Name of the model.
        lists: Queries and documents.
        top_n: Number of requested results; ``None`` for all.

    Yields:
        A function that adds the results of each list to its span.
    """
    tracer = _tracer()
    if tracer is None:
        yield lambda _: None
        return
    from openinference.instrumentation import Document, get_reranker_attributes

    parent = _langchain_context()
    with ExitStack() as stack:
        spans = [
            stack.enter_context(
                tracer.start_as_current_span(
                    "rerank", context=parent, openinference_span_kind="reranker"
                )
            )
            for _ in lists
        ]
        for span, candidates in zip(spans, lists, strict=True):
            if span.is_recording():
                inputs = [
                    Document(id=str(index), content=document)
                    for index, document in enumerate(candidates.documents)
                ]
                span.set_attributes(
                    get_reranker_attributes(
                        query=candidates.query,
                        model_name=model,
                        input_documents=inputs,
                        top_k=len(inputs) if top_n is None else top_n,
                    )
                )

        def finish(lists_of_results: Sequence[Sequence[RerankResult]]) -> None:
            for span, results in zip(spans, lists_of_results, strict=True):
                if span.is_recording():
                    ranked = [
                        Document(id=str(result.index), content=result.document, score=result.score)
                        for result in results
                        if result.reranked
                    ]
                    span.set_attributes(get_reranker_attributes(output_documents=ranked))

        yield finish


def without_second_span() -> AbstractContextManager[Any]:
    """Leave out the span of a rerank whose LlamaIndex events already become one."""
    if not _is_instrumented("llama_index", "LlamaIndexInstrumentor"):
        return nullcontext()
    from openinference.instrumentation import suppress_tracing

    suppressed: AbstractContextManager[Any] = suppress_tracing()
    return suppressed


@cache
def _tracer() -> Any:
    """Return a tracer, or ``None`` if OpenInference's instrumentation is not installed."""
    try:
        from openinference.instrumentation import OITracer, TraceConfig
        from opentelemetry import trace
    except ModuleNotFoundError:
        return None
    return OITracer(trace.get_tracer("core_rerank_integrations"), config=TraceConfig())


def _langchain_context() -> Any:
    """Return the context of the current run in LangChain, or the current context.

    OpenInference keeps the spans of runs to itself: they are not current ones of OpenTelemetry.
    """
    from opentelemetry import context, trace

    span = None
    if _is_instrumented("langchain", "LangChainInstrumentor"):
        from openinference.instrumentation.langchain import get_current_span

        span = get_current_span()
    return context.get_current() if span is None else trace.set_span_in_context(span)


def _is_instrumented(framework: str, instrumentor: str) -> bool:
    module = sys.modules.get(f"openinference.instrumentation.{framework}")
    return bool(module and getattr(module, instrumentor)().is_instrumented_by_opentelemetry)
