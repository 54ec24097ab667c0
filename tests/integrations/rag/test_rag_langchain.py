"""The chain on the embedded model, MiniLM and Qdrant; a model that answers repeats its prompt."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
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
    """Says what it was told, in pieces; a question it is to rewrite becomes one about ears."""

    heard: list[list[BaseMessage]] = Field(default_factory=list)

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
        self.heard.append(messages)
        return QUESTION if messages[0].text == REWRITE_INSTRUCTION else messages[-1].text


class Traces(BaseTracer):
    """Keeps the names of the runs that a call is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def _persist_run(self, run: Run) -> None:
        self.names = [child.name for child in run.child_runs]


@pytest.fixture
def retriever(handbook_store: Any) -> Any:
    return handbook_store.as_retriever(search_kwargs={"k": 20})


def asked(question: str = QUESTION, *history: BaseMessage) -> Any:
    return {"question": question, "history": list(history)}


def test_sentences_of_the_documents_answer(retriever: Any, default_reranker: CoReReranker) -> None:
    chain = create_rag_chain(retriever, reranker=default_reranker, top_n=3)
    parts = list(chain.stream(asked()))
    assert [key for part in parts for key in part if key != "milliseconds"] == [
        "search",
        "candidates",
        "reranked",
        "answerable",
        "documents",
        "answer",
        "answer",
    ]
    whole = chain.invoke(asked())
    assert whole["answer"].startswith("Full ear protection, both plugs and muffs, is compulsory")
    assert whole["answer"].endswith("[1]")
    assert whole["search"] == QUESTION
    assert len(whole["candidates"]) == len(whole["reranked"]) == 20
    assert whole["documents"] == whole["reranked"][:3]
    assert list(whole["milliseconds"]) == STAGES
    assert all(milliseconds >= 0 for milliseconds in whole["milliseconds"].values())


async def test_asynchronous_calls_say_the_same(
    retriever: Any, default_reranker: CoReReranker
) -> None:
    chain = create_rag_chain(retriever, Echo(), reranker=default_reranker, extract=0.3)
    expected, found = chain.invoke(asked()), await chain.ainvoke(asked())
    for key in expected.keys() - {"milliseconds"}:
        assert found[key] == expected[key], key


def test_nothing_answers_below_the_threshold(
    retriever: Any, default_reranker: CoReReranker
) -> None:
    llm = Echo()
    chain = create_rag_chain(retriever, llm, reranker=default_reranker, score_threshold=0.99)
    out = chain.invoke(asked())
    assert (out["answer"], out["documents"], llm.heard) == (NO_ANSWER, [], [])
    assert len(out["reranked"]) == 20
    best, second = sorted((d.metadata["relevance_score"] for d in out["reranked"]), reverse=True)[
        :2
    ]
    strict = create_rag_chain(
        retriever, reranker=default_reranker, score_threshold=(best + second) / 2
    )
    kept = strict.invoke(asked())["documents"]
    assert [document.metadata["relevance_score"] for document in kept] == [
        pytest.approx(best, abs=0.02)
    ]


@pytest.mark.parametrize(("intercept", "answers"), [(-99.0, False), (99.0, True)])
def test_heads_that_know_say_whether_anything_answers(
    retriever: Any, default_reranker: CoReReranker, intercept: float, answers: bool
) -> None:
    knowing = default_reranker.heads.with_scoring(
        abstention={
            "mean": -3.0,
            "candidates": 1.0,
            "slope": 1.0,
            "size_slope": 0.0,
            "intercept": intercept,
            "threshold": 0.5,
        }
    )
    reranker = CoReReranker(heads=knowing, reader=default_reranker.reader)
    out = create_rag_chain(retriever, reranker=reranker).invoke(asked())
    assert out["answerable"] == pytest.approx(float(answers), abs=1e-3)
    assert (out["answer"] != NO_ANSWER) == bool(out["documents"]) == answers
    always = create_rag_chain(retriever, reranker=reranker, score_threshold=None)
    assert always.invoke(asked())["answer"] != NO_ANSWER


def test_a_model_reads_numbered_passages_and_rewrites_follow_ups(
    retriever: Any, default_reranker: CoReReranker
) -> None:
    llm = Echo()
    chain = create_rag_chain(retriever, llm, reranker=default_reranker, top_n=2)
    history = [HumanMessage("What do the compressors do?"), AIMessage("They blow the horn. [1]")]
    out = chain.invoke(asked("And my ears?", *history))
    rewriting, answering = llm.heard
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
    out = chain.invoke(asked("and in winter?", HumanMessage("When does the ferry go?")))
    assert out["search"] == "When does the ferry go? and in winter?"


def test_extraction_shortens_what_a_model_reads(
    retriever: Any, default_reranker: CoReReranker
) -> None:
    whole, cut = Echo(), Echo()
    for llm, share in ((whole, None), (cut, 0.3)):
        create_rag_chain(retriever, llm, reranker=default_reranker, extract=share).invoke(asked())
    assert len(cut.heard[0][-1].text) < 0.5 * len(whole.heard[0][-1].text)
    assert "Full ear protection" in cut.heard[0][-1].text


def test_without_reranking_the_first_stage_answers(
    retriever: Any, default_reranker: CoReReranker
) -> None:
    out = create_rag_chain(retriever, reranker=default_reranker, rerank=False).invoke(asked())
    assert out["documents"] == out["candidates"][:5]
    assert "reranked" not in out
    assert out["answer"].startswith(" ".join(out["candidates"][0].page_content.split()))


async def test_traces_show_every_stage(retriever: Any, default_reranker: CoReReranker) -> None:
    chain = create_rag_chain(retriever, Echo(), reranker=default_reranker)
    follow_up = asked("And my ears?", HumanMessage("Compressors?"))
    sync, not_sync = Traces(), Traces()
    chain.invoke(follow_up, {"callbacks": [sync]})
    await chain.ainvoke(follow_up, {"callbacks": [not_sync]})
    for traces in (sync, not_sync):
        assert traces.names == [
            "RunnableSequence",
            "VectorStoreRetriever",
            "CoReDocumentCompressor",
            "RunnableSequence",
        ]


def test_questions_may_come_from_another_runnable(
    retriever: Any, default_reranker: CoReReranker
) -> None:
    chain = create_rag_chain(retriever, reranker=default_reranker)
    lowered = RunnableLambda(lambda text: asked(text)) | chain
    assert lowered.invoke(QUESTION)["search"] == QUESTION


def test_bad_input_is_named(retriever: Any) -> None:
    with pytest.raises(InvalidInputError, match="top_n must be at least 1"):
        create_rag_chain(retriever, top_n=0)
    with pytest.raises(InvalidInputError, match="question must be a text"):
        create_rag_chain(retriever).invoke(asked("  "))
