"""Adapters whose model runs in a server."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.runnables import RunnableLambda
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from pydantic import SecretStr, ValidationError
from support.canned_server import CannedServer, canned_server, reply, result

from core_rerank_integrations import (
    CoReDocumentCompressor,
    CoReDocumentIndexer,
    CoReNodeIndexer,
    CoReNodePostprocessor,
    CoReReranker,
    CoReRetriever,
    InvalidInputError,
    RemoteReranker,
)
from core_rerank_integrations.integrations.fields import RerankerFields

KEY = "sk-very-secret"
QUERY = "who invented the telephone"
TEXTS = ["a recipe", "Bread is baked. Bell invented the telephone.", "the ferry"]
EVIDENCE = [[16, 44, 0.4, [], 6], [0, 15, -0.1, [], 5]]
RANKED = reply(
    [
        result(1, 0.4, best_passage=[0, 44], evidence=EVIDENCE),
        result(0, 0.1, evidence=[[0, 8, 0.1, [], 3]]),
        result(2, None, probability=None, reranked=False),
    ]
)


@pytest.fixture
def server() -> Iterator[CannedServer]:
    with canned_server() as server:
        yield server


async def test_langchain(server: CannedServer) -> None:
    documents = [Document(text, id=str(index)) for index, text in enumerate(TEXTS)]
    found = RunnableLambda(lambda _: documents)
    shared = RemoteReranker(server.url, KEY)
    options: Any = {"extract": 0.6, "evidence": True}
    server.answers = [(200, {}, RANKED)] * 5
    own = CoReDocumentCompressor(base_url=server.url, api_key=KEY, **options)
    compressed = own.compress_documents(documents, QUERY)
    assert list(await own.acompress_documents(documents, QUERY)) == compressed
    await own.aclose()
    with shared:
        retriever = CoReRetriever(retriever=found, reranker=shared, **options)
        assert retriever.invoke(QUERY) == compressed
        assert await retriever.ainvoke(QUERY) == compressed
        changed = retriever.configurable_fields()
        assert changed.invoke(QUERY) == compressed
    assert [document.id for document in compressed] == ["1", "0", "2"]
    best, *_ = compressed
    assert best.page_content == "Bell invented the telephone."
    assert best.metadata["relevance_score"] == 0.4
    assert best.metadata["core_rerank"] == {
        "probability": 0.4,
        "reranked": True,
        "evidence": [[16, 44, 0.4], [0, 15, -0.1]],
        "best_passage": [0, 44],
        "extracted": [[16, 44]],
    }
    assert {request.headers["authorization"] for request in server.received} == {f"Bearer {KEY}"}
    assert {body["first_stage"] for body in server.bodies} == {"other"}
    assert all(body["evidence"] for body in server.bodies)
    indexer = CoReDocumentIndexer(base_url=server.url)
    assert await indexer.atransform_documents(documents) == documents
    assert server.bodies[-1] == {"documents": TEXTS}
    await indexer.aclose()


async def test_llama_index(server: CannedServer) -> None:
    nodes = [NodeWithScore(node=TextNode(text=text), score=0.5) for text in TEXTS]
    server.answers = [(200, {}, RANKED)] * 2
    query = QueryBundle(QUERY)
    own = CoReNodePostprocessor(base_url=server.url, api_key=SecretStr(KEY), top_n=3)
    ranked = own.postprocess_nodes(nodes, query)
    with RemoteReranker(server.url, KEY) as reranker:
        shared = CoReNodePostprocessor(reranker=reranker)
        again = await shared.apostprocess_nodes(nodes, query)
        assert shared.base_url == server.url
    assert [node.text for node in ranked] == [node.text for node in again]
    assert [node.text for node in ranked] == [TEXTS[1], TEXTS[0], TEXTS[2]]
    assert [node.score for node in ranked] == [0.4, 0.1, 0.0]
    assert ranked[0].metadata["core_rerank"]["probability"] == 0.4
    assert server.bodies[0]["first_stage_scores"] == [0.5, 0.5, 0.5]
    saved = own.to_dict()
    assert KEY not in str(saved)
    assert CoReNodePostprocessor.from_dict(saved).base_url == server.url
    own.close()
    indexer = CoReNodeIndexer(base_url=server.url)
    assert indexer([node.node for node in nodes]) == [node.node for node in nodes]
    assert server.bodies[-1] == {"documents": TEXTS}
    assert indexer.to_dict() != indexer.to_dict(), "a pipeline asks the server each time"
    indexer.close()


@pytest.mark.parametrize("kind", [CoReDocumentCompressor, CoReNodePostprocessor])
def test_no_key_is_saved_or_shown(
    kind: type[RerankerFields], server: CannedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = kind(base_url=server.url, api_key=KEY, timeout=9)
    adapter._rerank(QUERY, TEXTS)
    assert KEY not in f"{adapter!r} {adapter} {adapter.model_dump()} {adapter.model_dump_json()}"
    assert KEY.encode() not in pickle.dumps(adapter)
    monkeypatch.setenv("CORE_RERANK_API_KEY", "from-the-environment")
    copied = pickle.loads(pickle.dumps(adapter))
    assert (copied.base_url, copied.timeout, copied.api_key) == (server.url, 9, None)
    assert adapter.api_key == SecretStr(KEY)
    copied._rerank(QUERY, TEXTS)
    assert [request.headers["authorization"] for request in server.received] == [
        f"Bearer {KEY}",
        "Bearer from-the-environment",
    ]
    with RemoteReranker(server.url, KEY) as remote:
        shared = kind(reranker=remote)
        assert KEY.encode() not in pickle.dumps(shared)
        again = pickle.loads(pickle.dumps(shared))
        assert again.base_url == server.url
        again.close()
    adapter.close(), copied.close()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "another"}, "model is for a model in this process, and the server"),
        ({"backend": "openvino"}, "backend is for a model in this process"),
        ({"base_url": None}, "api_key is for a server: pass its base_url as well"),
        ({"base_url": "http://me:secret@host"}, "must not contain a user name, a password"),
        ({"base_url": "me:secret@host"}, "must be the address of a server"),
        ({"api_key": ["secret"]}, "valid string"),
        ({"apikey": "secret"}, "Extra inputs"),
        ({"token": "secret"}, "token is for a model in this process"),
        ({"device": "cpu", "backend": "vllm", "token": "secret"}, "device='cpu' is not for"),
        ({"top_n": 0}, "greater than or equal to 1 .*input_value=0"),
    ],
)
@pytest.mark.parametrize("kind", [CoReDocumentCompressor, CoReNodePostprocessor])
def test_contradictions_are_refused_without_secrets(
    kind: type[RerankerFields], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message) as error:
        kind(**{"base_url": "http://host", "api_key": KEY, **fields})
    assert KEY not in str(error.value)
    assert "secret" not in str(error.value)
    assert "secret" not in repr(error.value.errors())
    assert error.value.__context__ is None or error.value.__suppress_context__


def test_a_shared_reranker_has_its_settings(calibrated: CoReReranker) -> None:
    with RemoteReranker("http://host", KEY, max_retries=1) as remote:
        assert RerankerFields(reranker=remote).max_retries == 1
        with pytest.raises(ValidationError, match=r"timeout=5 contradicts .*timeout=60\.0"):
            RerankerFields(reranker=remote, timeout=5)
        with pytest.raises(ValidationError, match="api_key contradicts the given") as error:
            RerankerFields(reranker=remote, api_key="another-secret")
        with pytest.raises(ValidationError, match="model is for a model in this process"):
            RerankerFields(reranker=remote, model="another")
    assert "secret" not in str(error.value)
    with pytest.raises(ValidationError, match="base_url contradicts the given reranker"):
        RerankerFields(reranker=calibrated, base_url="http://host")


def test_a_key_that_no_request_can_hold(server: CannedServer) -> None:
    adapter = CoReDocumentCompressor(base_url=server.url, api_key="secret\n")
    with pytest.raises(InvalidInputError, match="not visible ASCII") as error:
        adapter.compress_documents([Document("a")], QUERY)
    assert "secret" not in str(error.value)
