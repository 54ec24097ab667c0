"""The chain, with the embedded model, MiniLM and Qdrant; a chat model that echoes its prompt."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableLambda
from langchain_core.tracers.base import BaseTracer
from langchain_core.tracers.schemas import Run
from pydantic import Field

from core_rerank_integrations import CoReReranker
from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.integrations.rag.langchain import create_rag_chain
from core_rerank_integrations.integrations.rag.prompts import NO_ANSWER, REWRITE_INSTRUCTION

QUESTION = "What ear protection is compulsory when you run the compressors?"
STAGES = ["search", "candidates", "reranked", "answer"]


class Echo(BaseChatModel):
    """Repeats the last message, in pieces; rewrites every question to one about ears."""

    prompts: list[list[BaseMessage]] = Field(default_factory=list)

    @property
    def _llm_type(self) -> str:
        return "echo"

    def _generate(self, messages: list[BaseMessage], *_: Any, **__: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=AIMessage(self._reply(messages)))])

    def _stream(
        self, messages: list[BaseMessage], *_: Any, **__: Any
    ) -> Iterator[ChatGenerationChunk]:
        for word in self._reply(messages).split(" "):
            yield ChatGenerationChunk(message=AIMessageChunk(content=f"{word} "))

    async def _astream(
        self, messages: list[BaseMessage], *_: Any, **__: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        for piece in self._stream(messages):
            yield piece

    def _reply(self, messages: list[BaseMessage]) -> str:
        self.prompts.append(messages)
        return QUESTION if messages[0].text == REWRITE_INSTRUCTION else messages[-1].text


class Traces(BaseTracer):
    """Collects the names of the runs below the root."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def _persist_run(self, run: Run) -> None:
        self.names = [child.name for child in run.child_runs]


@pytest.fixture
def retriever(handbook_store: Any) -> Any:
    return handbook_store.as_retriever(search_kwargs={"k": 20})


def chain_input(text: str = QUESTION, *history: BaseMessage) -> Any:
    return {"question": text, "history": list(history)}


def probability(document: Document) -> float:
    return document.metadata["core_rerank"]["probability"]


def test_sentences_of_the_documents_answer(retriever: Any, default_reranker: CoReReranker) -> None:
    chain = create_rag_chain(retriever, reranker=default_reranker, top_n=3)
    parts = list(chain.stream(chain_input()))
    assert [key for part in parts for key in part if key != "milliseconds"] == [
        "search",
        "candidates",
        "reranked",
        "answerable",
        "documents",
        "answer",
    ]
    whole = chain.invoke(chain_input())
    assert whole["answer"].startswith("Full ear protection, both plugs and muffs, is compulsory")
    assert whole["answer"].endswith("[1]")
    assert whole["search"] == QUESTION
    assert len(whole["candidates"]) == len(whole["reranked"]) == 20
    assert whole["documents"] == whole["reranked"][:3]
    assert list(whole["milliseconds"]) == STAGES
    assert all(milliseconds >= 0 for milliseconds in whole["milliseconds"].values())


async def test_asynchronous_calls_give_the_same(
    retriever: Any, default_reranker: CoReReranker
) -> None:
    chain = create_rag_chain(retriever, Echo(), reranker=default_reranker, extract=0.3)
    expected, found = chain.invoke(chain_input()), await chain.ainvoke(chain_input())
    for key in expected.keys() - {"milliseconds"}:
        assert found[key] == expected[key], key


def test_no_stage_runs_before_it_is_read(retriever: Any, default_reranker: CoReReranker) -> None:
    llm = Echo()
    parts = create_rag_chain(retriever, llm, reranker=default_reranker).stream(chain_input())
    assert any("documents" in part for part in parts)
    parts.close()
    assert llm.prompts == []


def test_nothing_answers_below_the_threshold(
    retriever: Any, default_reranker: CoReReranker
) -> None:
    llm = Echo()
    chain = create_rag_chain(retriever, llm, reranker=default_reranker, score_threshold=0.99)
    out = chain.invoke(chain_input())
    assert (out["answer"], out["documents"], llm.prompts) == (NO_ANSWER, [], [])
    assert len(out["reranked"]) == 20
    best, second = sorted(map(probability, out["reranked"]), reverse=True)[:2]
    strict = create_rag_chain(
        retriever, reranker=default_reranker, score_threshold=(best + second) / 2
    )
    kept = strict.invoke(chain_input())["documents"]
    assert list(map(probability, kept)) == [pytest.approx(best, abs=0.02)]


@pytest.mark.parametrize(("intercept", "answers"), [(-99.0, False), (99.0, True)])
def test_heads_with_an_abstention_tell_whether_anything_answers(
    retriever: Any, default_reranker: CoReReranker, intercept: float, answers: bool
) -> None:
    heads = default_reranker.heads.with_scoring(
        abstention={
            "mean": -3.0,
            "candidates": 1.0,
            "slope": 1.0,
            "size_slope": 0.0,
            "intercept": intercept,
            "threshold": 0.5,
        }
    )
    reranker = CoReReranker.from_scorer(default_reranker.scorer, heads=heads)
    out = create_rag_chain(retriever, reranker=reranker).invoke(chain_input())
    assert out["answerable"] == pytest.approx(float(answers), abs=1e-3)
    assert (out["answer"] != NO_ANSWER) == bool(out["documents"]) == answers
    always = create_rag_chain(retriever, reranker=reranker, score_threshold=None)
    assert always.invoke(chain_input())["answer"] != NO_ANSWER


def test_a_model_reads_numbered_passages_and_rewrites_follow_ups(
    retriever: Any, default_reranker: CoReReranker
) -> None:
    llm = Echo()
    chain = create_rag_chain(retriever, llm, reranker=default_reranker, top_n=2)
    history = [HumanMessage("What do the compressors do?"), AIMessage("They blow the horn. [1]")]
    out = chain.invoke(chain_input("And my ears?", *history))
    rewriting, answering = llm.prompts
    assert [message.text for message in rewriting[1:]] == [
        *(message.text for message in history),
        "And my ears?",
    ]
    assert out["search"] == QUESTION
    assert "[1] " in answering[-1].text
    assert "[2] " in answering[-1].text
    assert "[3] " not in answering[-1].text
    assert answering[-1].text.endswith("Question: And my ears?")
    assert "Full ear protection" in out["answer"]


def test_without_a_model_a_follow_up_is_searched_with_the_question_before_it(
    retriever: Any, default_reranker: CoReReranker
) -> None:
    chain = create_rag_chain(retriever, reranker=default_reranker)
    out = chain.invoke(chain_input("and in winter?", HumanMessage("When does the ferry go?")))
    assert out["search"] == "When does the ferry go? and in winter?"


def test_extraction_shortens_what_a_model_reads(
    retriever: Any, default_reranker: CoReReranker
) -> None:
    whole, cut = Echo(), Echo()
    for llm, share in ((whole, None), (cut, 0.3)):
        create_rag_chain(retriever, llm, reranker=default_reranker, extract=share).invoke(
            chain_input()
        )
    assert len(cut.prompts[0][-1].text) < 0.5 * len(whole.prompts[0][-1].text)
    assert "Full ear protection" in cut.prompts[0][-1].text


def test_without_reranking_the_first_stage_answers(
    retriever: Any, default_reranker: CoReReranker
) -> None:
    out = create_rag_chain(retriever, reranker=default_reranker, rerank=False).invoke(chain_input())
    assert out["documents"] == out["candidates"][:5]
    assert "reranked" not in out
    assert out["answer"].startswith(" ".join(out["candidates"][0].page_content.split()))


async def test_traces_show_every_stage(retriever: Any, default_reranker: CoReReranker) -> None:
    chain = create_rag_chain(retriever, Echo(), reranker=default_reranker)
    follow_up = chain_input("And my ears?", HumanMessage("Compressors?"))
    sync, not_sync = Traces(), Traces()
    chain.invoke(follow_up, {"callbacks": [sync]})
    await chain.ainvoke(follow_up, {"callbacks": [not_sync]})
    for traces in (sync, not_sync):
        assert traces.names == [
            "search",
            "VectorStoreRetriever",
            "CoReDocumentCompressor",
            "answer",
        ]


def test_questions_may_come_from_another_runnable(
    retriever: Any, default_reranker: CoReReranker
) -> None:
    chain = create_rag_chain(retriever, reranker=default_reranker)
    lowered = RunnableLambda(lambda text: chain_input(text)) | chain
    assert lowered.invoke(QUESTION)["search"] == QUESTION


def test_errors_name_the_input(retriever: Any, default_reranker: CoReReranker) -> None:
    with pytest.raises(InvalidInputError, match=r"top_n: .+ greater than or equal to 1, got 0"):
        create_rag_chain(retriever, top_n=0)
    with pytest.raises(InvalidInputError, match="question must be a text"):
        create_rag_chain(retriever, reranker=default_reranker).invoke(chain_input("  "))
