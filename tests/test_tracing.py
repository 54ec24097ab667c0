"""Spans of reranks, collected by OpenTelemetry's own exporter."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator

import pytest

from core_rerank_integrations import CoReReranker, tracing
from core_rerank_integrations.errors import InvalidInputError

pytest.importorskip("openinference.instrumentation")

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import (
    InMemorySpanExporter,
)

QUERY = "Who patented the telephone?"
DOCUMENTS = ["Bread is baked from flour.", "Bell patented the telephone in 1876."]


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    tracing._tracer.cache_clear()
    yield exporter
    tracing._tracer.cache_clear()


def spans(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def test_a_rerank_is_a_span_in_the_words_of_openinference(
    reranker: CoReReranker, exporter: InMemorySpanExporter
) -> None:
    (best,) = reranker.rerank(QUERY, DOCUMENTS, top_n=1)
    attributes = spans(exporter)["rerank"].attributes
    assert attributes["openinference.span.kind"] == "RERANKER"
    assert attributes["reranker.query"] == QUERY
    assert attributes["reranker.model_name"] == reranker.model
    assert attributes["reranker.top_k"] == 1
    for index, document in enumerate(DOCUMENTS):
        name = f"reranker.input_documents.{index}.document"
        assert attributes[f"{name}.content"] == document
    output = "reranker.output_documents.0.document"
    assert attributes[f"{output}.id"] == "1"
    assert attributes[f"{output}.score"] == pytest.approx(best.score)
    assert "reranker.output_documents.1.document.id" not in attributes


def test_it_hangs_below_what_called_it(
    reranker: CoReReranker, exporter: InMemorySpanExporter
) -> None:
    with trace.get_tracer("caller").start_as_current_span("question"):
        asyncio.run(reranker.arerank(QUERY, DOCUMENTS))
    found = spans(exporter)
    assert found["rerank"].parent.span_id == found["question"].context.span_id


def test_texts_can_be_hidden(
    reranker: CoReReranker, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENINFERENCE_HIDE_INPUTS", "true")
    monkeypatch.setenv("OPENINFERENCE_HIDE_OUTPUTS", "true")
    reranker.rerank(QUERY, DOCUMENTS)
    shown = str(dict(spans(exporter)["rerank"].attributes))
    assert "telephone" not in shown


def test_bad_input_is_no_rerank(reranker: CoReReranker, exporter: InMemorySpanExporter) -> None:
    with pytest.raises(InvalidInputError):
        reranker.rerank("", DOCUMENTS)
    assert spans(exporter) == {}


def test_nothing_is_traced_where_it_is_not_installed() -> None:
    code = (
        "import sys; sys.modules['openinference.instrumentation'] = None\n"
        "from core_rerank_integrations.tracing import rerank_span\n"
        "with rerank_span('m', 'q', ['d'], None) as finish: finish([])\n"
        "print('opentelemetry' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr
