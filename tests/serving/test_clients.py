"""Unmodified clients against the running server: the same order and scores as the library."""

from __future__ import annotations

import pytest

from core_rerank_integrations import CoReReranker, RerankResults

QUERY = "What is the capital of Australia?"
TEXTS = [
    "Ottawa is the capital of Canada.",
    "Sydney is the largest city in Australia.",
    "Canberra is the capital of Australia.",
]
CLOSE = {"rel": 1e-3, "abs": 1e-5}


@pytest.fixture(scope="module")
def expected(default: CoReReranker) -> RerankResults:
    return default.rerank(QUERY, TEXTS)


def check(found: list[tuple[int, float]], expected: RerankResults) -> None:
    assert [index for index, _ in found] == [r.index for r in expected][: len(found)]
    assert [score for _, score in found] == pytest.approx(
        [r.relevance_score for r in expected][: len(found)], **CLOSE
    )


def test_cohere(server, expected: RerankResults) -> None:
    cohere = pytest.importorskip("cohere")
    first = cohere.Client("key", base_url=server.url)
    reply = first.rerank(query=QUERY, documents=TEXTS, model="m", return_documents=True)
    check([(row.index, row.relevance_score) for row in reply.results], expected)
    assert [row.document.text for row in reply.results] == [r.document for r in expected]
    objects = first.rerank(query=QUERY, documents=[{"text": text} for text in TEXTS], top_n=2)
    check([(row.index, row.relevance_score) for row in objects.results], expected)
    second = cohere.ClientV2("key", base_url=server.url)
    reply = second.rerank(query=QUERY, documents=TEXTS, model="m", top_n=2)
    assert len(reply.results) == 2
    assert reply.id
    check([(row.index, row.relevance_score) for row in reply.results], expected)


def test_errors_of_cohere_carry_the_message(server) -> None:
    cohere = pytest.importorskip("cohere")
    client = cohere.ClientV2("key", base_url=server.url)
    with pytest.raises(cohere.core.ApiError) as caught:
        client.rerank(query=" ", documents=TEXTS, model="m")
    assert caught.value.status_code == 422
    assert "the query is empty" in caught.value.body["message"]


async def test_asynchronous_cohere(server, expected: RerankResults) -> None:
    cohere = pytest.importorskip("cohere")
    client = cohere.AsyncClientV2("key", base_url=server.url)
    reply = await client.rerank(query=QUERY, documents=TEXTS, model="m")
    check([(row.index, row.relevance_score) for row in reply.results], expected)


def test_langchain_cohere(server, expected: RerankResults) -> None:
    langchain_cohere = pytest.importorskip("langchain_cohere")
    from langchain_core.documents import Document

    compressor = langchain_cohere.CohereRerank(
        model="m", cohere_api_key="key", base_url=server.url, top_n=2
    )
    found = compressor.compress_documents([Document(text) for text in TEXTS], QUERY)
    assert [document.page_content for document in found] == [r.document for r in expected][:2]
    scores = [document.metadata["relevance_score"] for document in found]
    assert scores == pytest.approx([r.relevance_score for r in expected][:2], **CLOSE)


@pytest.mark.parametrize("name", ["cohere", "jinaai", "tei"])
def test_llama_index(server, expected: RerankResults, name: str) -> None:
    module = pytest.importorskip(f"llama_index.postprocessor.{name}_rerank")
    from llama_index.core.schema import NodeWithScore, TextNode

    postprocessor = {
        "cohere": lambda: module.CohereRerank(top_n=2, api_key="key", base_url=server.url),
        "jinaai": lambda: module.JinaRerank(top_n=2, api_key="key", base_url=f"{server.url}/v1"),
        "tei": lambda: module.TextEmbeddingInference(top_n=2, base_url=server.url),
    }[name]()
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in TEXTS]
    found = postprocessor.postprocess_nodes(nodes, query_str=QUERY)
    assert [node.text for node in found] == [r.document for r in expected][:2]
    assert [node.score for node in found] == pytest.approx(
        [r.relevance_score for r in expected][:2], **CLOSE
    )
