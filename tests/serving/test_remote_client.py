"""`RemoteReranker` and the adapters against `core-rerank serve` with the real model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.runnables import RunnableLambda
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from support.servers import running

from core_rerank_integrations import (
    CoReDocumentCompressor,
    CoReNodePostprocessor,
    CoReReranker,
    DocumentTruncatedWarning,
    InvalidInputError,
    RemoteReranker,
    RerankResults,
)
from core_rerank_integrations.integrations.rag.langchain import create_rag_chain
from core_rerank_integrations.integrations.rag.llama_index import create_rag_chat_engine
from core_rerank_integrations.integrations.rag.prompts import NO_ANSWER

KEY = "a-key"
QUERY = "Who patented the telephone?"
DOCUMENTS = [
    "Bread is baked from flour. It rises.",
    "March is often wet. Alexander Graham Bell patented the telephone in 1876. Gulls 🐦 cry.",
    "The ferry leaves at six. " * 120,
]


@pytest.fixture(scope="module")
def url(shared: Callable[[], CoReReranker]) -> Iterator[str]:
    with running(shared, KEY, max_documents=50) as server:
        server.wait_until_ready()
        yield server.url


def check_equal(remote: RerankResults, local: RerankResults) -> None:
    assert remote.answerability == pytest.approx(local.answerability, abs=1e-4)
    assert remote.answerable == local.answerable
    assert [result.index for result in remote] == [result.index for result in local]
    for got, expected in zip(remote, local, strict=True):
        assert got.score == pytest.approx(expected.score, abs=1e-4)
        assert got.probability == pytest.approx(expected.probability, abs=1e-4)
        assert (got.document, got.best_passage) == (expected.document, expected.best_passage)
        assert got.reranked == expected.reranked
        assert len(got.evidence) == len(expected.evidence)
        for part, own in zip(sorted(got.evidence), sorted(expected.evidence), strict=True):
            assert (part.start, part.stop, part.tokens) == (own.start, own.stop, own.tokens)
            assert part.score == pytest.approx(own.score, abs=1e-4)
            assert [word[:2] for word in part.words] == [word[:2] for word in own.words]


async def call(remote: RemoteReranker, documents: list[str], awaits: bool) -> RerankResults:
    return await remote.arerank(QUERY, documents) if awaits else remote.rerank(QUERY, documents)


@pytest.mark.parametrize("awaits", [False, True])
async def test_the_caller_is_warned_of_what_the_server_truncates(default, awaits: bool) -> None:
    short = partial(CoReReranker.from_scorer, default.scorer, max_document_tokens=6)
    documents = ["Bread.", *DOCUMENTS[1:]]
    with running(short) as server:
        server.wait_until_ready()
        with RemoteReranker(server.url) as remote, pytest.warns(DocumentTruncatedWarning) as caught:
            await call(remote, documents, awaits)
    # The server, in this process, warns its own caller.
    (warning,) = [item for item in caught if "documents [1, 2]" in str(item.message)]
    assert warning.filename == __file__


@pytest.mark.commands
async def test_results_are_those_of_the_model(default: CoReReranker, url: str) -> None:
    lists = [(QUERY, DOCUMENTS), ("When does the ferry leave?", DOCUMENTS), (QUERY, [])]
    with RemoteReranker(url, KEY) as remote:
        assert remote.cache_documents(DOCUMENTS) >= 0
        options: list[Any] = [
            {"evidence": True},
            {"top_n": 1, "first_stage": "dense"},
            {"score_threshold": "auto"},
            {"min_score": 1e6},
        ]
        for option in options:
            local = default.rerank_batch(lists, **option)
            for got, expected in zip(remote.rerank_batch(lists, **option), local, strict=True):
                check_equal(got, expected)
        scores = [3.0, 2.0, 1.0]
        changed: Any = {"first_stage": "other", "first_stage_scores": scores}
        check_equal(
            await remote.arerank(QUERY, DOCUMENTS, **changed),
            default.rerank(QUERY, DOCUMENTS, **changed),
        )
        found = await asyncio.gather(*(remote.arerank(*own) for own in lists * 4))
        for got, expected in zip(found, default.rerank_batch(lists * 4), strict=True):
            check_equal(got, expected)
        unread = remote.rerank(
            QUERY, [f"{number} {DOCUMENTS[2]}" for number in range(20)], max_seconds=1e-6
        )
        assert not unread[-1].reranked


def test_adapters_say_the_same(default: CoReReranker, url: str) -> None:
    documents = [Document(text) for text in DOCUMENTS]
    nodes = [NodeWithScore(node=TextNode(text=text), score=0.5) for text in DOCUMENTS]
    settings: Any = {"extract": 0.5, "evidence": True, "top_n": 2}
    remote = RemoteReranker(url, KEY)
    with remote:
        own = CoReDocumentCompressor(reranker=default, **settings)
        other = CoReDocumentCompressor(reranker=remote, **settings)
        local = own.compress_documents(documents, QUERY)
        for got, expected in zip(other.compress_documents(documents, QUERY), local, strict=True):
            assert got.page_content == expected.page_content
            ours, theirs = (d.metadata["core_rerank"] for d in (got, expected))
            assert ours["extracted"] == theirs["extracted"]
            assert ours["probability"] == pytest.approx(theirs["probability"], abs=1e-4)
        ranked = [
            CoReNodePostprocessor(reranker=reranker, **settings).postprocess_nodes(
                nodes, QueryBundle(QUERY)
            )
            for reranker in (default, remote)
        ]
    assert [node.text for node in ranked[0]] == [node.text for node in ranked[1]]


class AllNodes(BaseRetriever):
    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:  # noqa: ARG002
        return [NodeWithScore(node=TextNode(text=text), score=0.5) for text in DOCUMENTS]


@pytest.mark.parametrize("question", [QUERY, "How tall is the tower?"])
def test_chains_say_the_same(default: CoReReranker, url: str, question: str) -> None:
    found: Any = RunnableLambda(lambda _: [Document(text) for text in DOCUMENTS])
    with RemoteReranker(url, KEY) as remote:
        chains = [create_rag_chain(found, reranker=own) for own in (remote, default)]
        here, there = (chain.invoke(question) for chain in chains)
        engines = [create_rag_chat_engine(AllNodes(), reranker=own) for own in (remote, default)]
        replies = [engine.chat(question).response for engine in engines]
    assert here["answer"] == there["answer"]
    assert here["documents"] == there["documents"]
    assert here["answerable"] == pytest.approx(there["answerable"], abs=1e-4)
    assert replies[0] == replies[1]


CHAINS: list[Callable[..., Any]] = [
    lambda reranker, **options: create_rag_chain(
        RunnableLambda(lambda _: [Document(text) for text in DOCUMENTS]),
        reranker=reranker,
        **options,
    ).invoke(QUERY)["answer"],
    lambda reranker, **options: (
        create_rag_chat_engine(AllNodes(), reranker=reranker, **options).chat(QUERY).response
    ),
]


@pytest.mark.parametrize("answer", CHAINS, ids=["langchain", "llama-index"])
def test_chains_of_heads_that_do_not_know_the_answerability(
    default: CoReReranker, answer: Callable[..., Any]
) -> None:
    heads = default.heads.with_scoring(abstention=None)
    with (
        running(lambda: CoReReranker.from_scorer(default.scorer, heads=heads)) as server,
        RemoteReranker(server.url) as remote,
    ):
        server.wait_until_ready()
        always = answer(remote)
        assert "Bell patented the telephone in 1876." in always
        assert answer(remote, score_threshold=None) == always
        assert answer(remote, score_threshold=1.0) == NO_ANSWER


@pytest.mark.parametrize("answer", CHAINS, ids=["langchain", "llama-index"])
def test_chains_of_heads_without_probabilities(
    default: CoReReranker, answer: Callable[..., Any]
) -> None:
    heads = default.heads.with_scoring(abstention=None, calibration=None)
    local = CoReReranker.from_scorer(default.scorer, heads=heads)
    with (
        running(lambda: CoReReranker.from_scorer(default.scorer, heads=heads)) as server,
        RemoteReranker(server.url) as remote,
    ):
        server.wait_until_ready()
        for reranker in (local, remote):
            assert "Bell patented the telephone in 1876." in answer(reranker)
            with pytest.raises(InvalidInputError, match=r"=0\.5 is a prob.+ not calibrated"):
                answer(reranker, score_threshold=0.5)


def test_documents_are_cached_within_the_limits_of_a_server(
    shared: Callable[[], CoReReranker],
) -> None:
    documents = [f"Ferry {number} leaves at noon." for number in range(5)]
    with running(shared, max_documents=2) as server, RemoteReranker(server.url) as remote:
        server.wait_until_ready()
        assert remote.cache_documents(documents) > 0
        assert remote.cache_documents(documents) == 0, "all are cached"


def test_what_the_server_refuses(url: str) -> None:
    with RemoteReranker(url, KEY) as remote, RemoteReranker(url, "wrong") as wrong:
        with pytest.raises(InvalidInputError, match=r"answered 413: .*more than the 50"):
            remote.rerank(QUERY, ["a"] * 51)
        with pytest.raises(InvalidInputError, match=r"answered 422: .*max_query_tokens"):
            remote.rerank("word " * 2000, DOCUMENTS)
        with pytest.raises(InvalidInputError, match=r"answered 401: .*; pass the server's"):
            wrong.rerank(QUERY, DOCUMENTS)
