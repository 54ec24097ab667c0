"""Spans of reranks, collected by OpenTelemetry's own exporter."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

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
from core_rerank_integrations.method.windows import Candidates
from core_rerank_integrations.tracing import rerank_spans
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
trace.set_tracer_provider(TracerProvider())
with rerank_spans("model", [Candidates("a query", ("a document",))], None) as finish:
    finish([[RerankResult(0, 1.0, "a document")]])
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


def test_lists_of_a_batch_are_siblings(
    reranker: CoReReranker, exporter: InMemorySpanExporter
) -> None:
    with trace.get_tracer("caller").start_as_current_span("question") as caller:
        reranker.rerank_batch([(QUERY, DOCUMENTS), (QUERY, DOCUMENTS[:1])], top_n=1)
    first, second, _ = exporter.get_finished_spans()
    parents = [span.parent.span_id for span in (first, second)]
    assert parents == [caller.get_span_context().span_id] * 2


def kinds(exporter: InMemorySpanExporter) -> dict[str, list[str]]:
    """Return the names of the spans of each kind, without the class."""
    names: dict[str, list[str]] = {}
    for span in exporter.get_finished_spans():
        kind = str(span.attributes.get("openinference.span.kind"))
        names.setdefault(kind, []).append(span.name.rpartition(".")[2])
    return names


@pytest.fixture
def langchain(exporter: InMemorySpanExporter) -> Iterator[Any]:
    instrumentation = pytest.importorskip("openinference.instrumentation.langchain")
    instrumentor = instrumentation.LangChainInstrumentor()
    instrumentor.instrument(skip_dep_check=True)
    yield exporter
    instrumentor.uninstrument()


@pytest.fixture
def llama_index(exporter: InMemorySpanExporter) -> Iterator[Any]:
    instrumentation = pytest.importorskip("openinference.instrumentation.llama_index")
    instrumentor = instrumentation.LlamaIndexInstrumentor()
    instrumentor.instrument(skip_dep_check=True)
    yield exporter
    instrumentor.uninstrument()


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("is_retriever", [False, True])
def test_a_rerank_belongs_to_the_trace_of_its_chain(
    reranker: CoReReranker, langchain: InMemorySpanExporter, is_async: bool, is_retriever: bool
) -> None:
    from langchain_core.documents import Document
    from langchain_core.runnables import RunnableLambda

    from core_rerank_integrations import CoReRetriever

    candidates = RunnableLambda(lambda _: [Document(text) for text in DOCUMENTS])
    if is_retriever:
        chain = CoReRetriever(retriever=candidates, reranker=reranker) | len
    else:
        chain = RunnableLambda(lambda query: reranker.rerank(query, DOCUMENTS)) | len
    asyncio.run(chain.ainvoke(QUERY)) if is_async else chain.invoke(QUERY)
    rerank = spans(langchain)["rerank"]
    names = {span.context.span_id: span.name for span in langchain.get_finished_spans()}
    assert names[rerank.parent.span_id] == ("CoReReranker" if is_retriever else "RunnableLambda")
    assert len({span.context.trace_id for span in langchain.get_finished_spans()}) == 1
    assert kinds(langchain)["RERANKER"] == ["rerank"]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_rerank_in_a_query_is_one_span_of_its_kind(
    reranker: CoReReranker, llama_index: InMemorySpanExporter, is_async: bool
) -> None:
    from llama_index.core import Settings
    from llama_index.core.query_engine import RetrieverQueryEngine
    from llama_index.core.retrievers import BaseRetriever
    from llama_index.core.schema import NodeWithScore, TextNode

    from core_rerank_integrations import CoReNodePostprocessor

    class Retriever(BaseRetriever):
        def _retrieve(self, _query: Any) -> list[NodeWithScore]:
            return [NodeWithScore(node=TextNode(text=text)) for text in DOCUMENTS]

    Settings.llm = None  # Sources are returned, nothing is generated.
    engine = RetrieverQueryEngine.from_args(
        Retriever(),
        node_postprocessors=[CoReNodePostprocessor(reranker=reranker)],
        response_mode="no_text",
    )
    asyncio.run(engine.aquery(QUERY)) if is_async else engine.query(QUERY)
    name = "_apostprocess_nodes" if is_async else "_postprocess_nodes"
    found = kinds(llama_index)
    assert found["RERANKER"] == [name]
    assert ("_aquery" if is_async else "_query") in found["CHAIN"]
    assert len({span.context.trace_id for span in llama_index.get_finished_spans()}) == 1
    llama_index.clear()
    reranker.rerank(QUERY, DOCUMENTS)
    assert kinds(llama_index) == {"RERANKER": ["rerank"]}, "outside of LlamaIndex"


def test_invalid_input_gives_no_span(
    reranker: CoReReranker, exporter: InMemorySpanExporter
) -> None:
    with pytest.raises(InvalidInputError):
        reranker.rerank("", DOCUMENTS)
    assert spans(exporter) == {}


def test_nothing_is_traced_without_openinference() -> None:
    code = (
        "import sys; sys.modules['openinference.instrumentation'] = None\n"
        "from core_rerank_integrations.tracing import rerank_spans\n"
        "with rerank_spans('m', [], None) as finish: finish([])\n"
        "print('opentelemetry' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr
