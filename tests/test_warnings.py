"""Warnings point at the line of the user's code, whatever lies between."""

from __future__ import annotations

import asyncio
import inspect
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda, RunnableParallel
from llama_index.core.schema import NodeWithScore, TextNode
from support.head_sets import HEADS

from core_rerank_integrations import (
    CoReDocumentCompressor,
    CoReNodePostprocessor,
    CoReReranker,
    CoReRetriever,
)
from core_rerank_integrations.errors import DocumentTruncatedWarning
from core_rerank_integrations.models.local_model import LocalModel

QUERY, LONG = "Who called?", "telephone " * 50
DOCUMENTS = [Document(LONG)]
NODES = [NodeWithScore(node=TextNode(text=LONG))]


@pytest.fixture(scope="module")
def cutting(smollm2: LocalModel, reranker: CoReReranker) -> CoReReranker:
    return CoReReranker.from_scorer(reranker.scorer, smollm2.path, HEADS, max_document_tokens=20)


class Same(BaseRetriever):
    def _get_relevant_documents(self, *_: Any, **__: Any) -> list[Document]:
        return DOCUMENTS


def retriever(cutting: CoReReranker) -> CoReRetriever:
    return CoReRetriever(reranker=cutting, retriever=Same())


def in_chain(cutting: CoReReranker) -> object:
    compressor = CoReDocumentCompressor(reranker=cutting)
    chain = RunnableLambda(lambda query: compressor.compress_documents(DOCUMENTS, query))
    return (RunnableLambda(str) | chain).invoke(QUERY)


async def astream(cutting: CoReReranker) -> object:
    return [part async for part in retriever(cutting).astream(QUERY)]


def in_thread(cutting: CoReReranker) -> object:
    with ThreadPoolExecutor() as threads:
        return threads.submit(lambda: cutting.rerank(QUERY, [LONG])).result()


CALLS: dict[str, Callable[[CoReReranker], object]] = {
    "rerank": lambda cutting: cutting.rerank(QUERY, [LONG]),
    "score": lambda cutting: cutting.score(QUERY, [LONG]),
    "batch": lambda cutting: cutting.rerank_batch([(QUERY, [LONG])]),
    "arerank": lambda cutting: asyncio.run(cutting.arerank(QUERY, [LONG])),
    "retriever": lambda cutting: retriever(cutting).invoke(QUERY),
    "async retriever": lambda cutting: asyncio.run(retriever(cutting).ainvoke(QUERY)),
    "async stream": lambda cutting: asyncio.run(astream(cutting)),
    "chain": in_chain,
    "thread": in_thread,
    "nodes": lambda cutting: CoReNodePostprocessor(reranker=cutting).postprocess_nodes(
        NODES, query_str=QUERY
    ),
    "async nodes": lambda cutting: asyncio.run(
        CoReNodePostprocessor(reranker=cutting).apostprocess_nodes(NODES, query_str=QUERY)
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_warning_points_at_the_line_of_the_user(
    call: Callable[[CoReReranker], object], cutting: CoReReranker
) -> None:
    with pytest.warns(DocumentTruncatedWarning) as warned:
        call(cutting)
    assert {item.filename for item in warned} == {__file__}
    lines, first = inspect.getsourcelines(call)
    own = range(first, first + len(lines))
    others = inspect.getsourcelines(astream)
    asynchronous = range(others[1], others[1] + len(others[0]))
    assert all(item.lineno in own or item.lineno in asynchronous for item in warned)


def test_where_no_code_of_the_user_runs_the_warning_comes_all_the_same(
    cutting: CoReReranker,
) -> None:
    parallel = RunnableParallel(one=retriever(cutting), two=retriever(cutting))
    with pytest.warns(DocumentTruncatedWarning) as warned:
        parallel.invoke(QUERY)
    assert not any("core_rerank_integrations" in item.filename for item in warned)


def test_a_line_that_repeats_warns_once(cutting: CoReReranker) -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        for _ in range(3):
            cutting.rerank(QUERY, [LONG])
        cutting.rerank(QUERY, [LONG])
    assert len(warned) == 2
