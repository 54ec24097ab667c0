"""Spans of reranks, collected by OpenTelemetry's own exporter."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from core_rerank_integrations import CoReReranker
from core_rerank_integrations.errors import InvalidInputError

pytest.importorskip("openinference.instrumentation")

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

QUERY = "Who patented the telephone?"
DOCUMENTS = ["Bread is baked from flour.", "Bell patented the telephone in 1876."]
IN_ANOTHER_PROGRAM = """\
from core_rerank_integrations import RerankResult
from core_rerank_integrations.tracing import rerank_span
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
trace.set_tracer_provider(TracerProvider())
with rerank_span("model", "a query", ["a document"], None) as finish:
    finish([RerankResult(0, 1.0, "a document")])
    print(dict(trace.get_current_span().attributes))
"""


@pytest.fixture(scope="module")
def module_exporter() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    yield exporter
    provider.shutdown()


@pytest.fixture
def exporter(module_exporter: InMemorySpanExporter) -> InMemorySpanExporter:
    module_exporter.clear()
    return module_exporter


def spans(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def test_a_rerank_is_a_span_with_the_attributes_of_openinference(
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


def test_the_span_of_the_caller_is_its_parent(
    reranker: CoReReranker, exporter: InMemorySpanExporter
) -> None:
    with trace.get_tracer("caller").start_as_current_span("question"):
        asyncio.run(reranker.arerank(QUERY, DOCUMENTS))
    found = spans(exporter)
    assert found["rerank"].parent.span_id == found["question"].context.span_id


@pytest.mark.parametrize(("hidden", "is_shown"), [("false", True), ("true", False)])
def test_openinference_can_hide_texts(hidden: str, is_shown: bool) -> None:
    result = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        env={
            **os.environ,
            "OPENINFERENCE_HIDE_INPUTS": hidden,
            "OPENINFERENCE_HIDE_OUTPUTS": hidden,
        },
    )
    assert "RERANKER" in result.stdout
    assert ("a query" in result.stdout) == ("a document" in result.stdout) == is_shown


def test_invalid_input_gives_no_span(
    reranker: CoReReranker, exporter: InMemorySpanExporter
) -> None:
    with pytest.raises(InvalidInputError):
        reranker.rerank("", DOCUMENTS)
    assert spans(exporter) == {}


def test_nothing_is_traced_without_openinference() -> None:
    code = (
        "import sys; sys.modules['openinference.instrumentation'] = None\n"
        "from core_rerank_integrations.tracing import rerank_span\n"
        "with rerank_span('m', 'q', ['d'], None) as finish: finish([])\n"
        "print('opentelemetry' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr
