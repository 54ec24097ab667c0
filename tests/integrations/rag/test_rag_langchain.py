"""The chain, with the embedded model, MiniLM and Qdrant; a chat model that echoes its prompt."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    HumanMessage,
)
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.prompt_values import ChatPromptValue
from langchain_core.runnables import ConfigurableField, RunnableLambda
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


def test_an_empty_rewrite_is_searched_like_no_rewrite(retriever: Any) -> None:
    silent = FakeListChatModel(responses=[" \n", "An answer."])
    out = create_rag_chain(retriever, silent, rerank=False).invoke(
        chain_input("and in winter?", HumanMessage("When does the ferry go?"))
    )
    assert out["search"] == "When does the ferry go? and in winter?"
    assert out["answer"] == "An answer."


HISTORIES: list[Any] = [
    [HumanMessage("When does the ferry go?"), AIMessage("At six.")],
    [("user", "When does the ferry go?"), ("assistant", "At six.")],
    [("human", "When does the ferry go?"), ("ai", "At six.")],
    [
        {"role": "user", "content": "When does the ferry go?"},
        {"role": "assistant", "content": "At six."},
    ],
    [{"type": "human", "content": "When does the ferry go?"}],
    [HumanMessage([{"type": "text", "text": "When does the ferry go?"}])],
    [ChatMessage("When does the ferry go?", role="user")],
    ChatPromptValue(messages=[HumanMessage("When does the ferry go?")]),
]


@pytest.mark.parametrize("history", HISTORIES, ids=str)
def test_a_history_of_messages_of_every_form(retriever: Any, history: Any) -> None:
    question: Any = {"question": "and in winter?", "history": history}
    chain = create_rag_chain(retriever, rerank=False)
    assert chain.invoke(question)["search"] == "When does the ferry go? and in winter?"
    llm = Echo()
    create_rag_chain(retriever, llm, rerank=False).invoke(question)
    assert llm.prompts[0][1].text == "When does the ferry go?"


@pytest.mark.parametrize(
    "history", ["text", {"role": "user", "content": "x"}, [("who?", "me")], [1], 1, [{"text": "x"}]]
)
def test_other_histories_are_refused(retriever: Any, history: Any) -> None:
    chain = create_rag_chain(retriever, rerank=False)
    with pytest.raises(InvalidInputError, match="history must be a list of messages"):
        chain.invoke({"question": QUESTION, "history": history})


async def test_the_question_alone_is_an_input(retriever: Any) -> None:
    chain = create_rag_chain(retriever, rerank=False)
    asked: list[Any] = [QUESTION, {"question": QUESTION}, {"question": QUESTION, "history": None}]
    for question in asked:
        assert chain.invoke(question)["search"] == QUESTION
        assert (await chain.ainvoke(question))["search"] == QUESTION
    found = chain.batch(asked[:2])
    assert [out["search"] for out in found] == [QUESTION] * 2
    streamed = FakeListChatModel(responses=[QUESTION]) | StrOutputParser() | chain
    assert streamed.invoke("Ask something.")["search"] == QUESTION
    for wrong in ({"input": QUESTION}, 7, [HumanMessage(QUESTION)]):
        with pytest.raises(InvalidInputError, match="a dictionary with the key 'question'"):
            chain.invoke(wrong)


async def test_whatever_langchain_takes_for_a_retriever(
    retriever: Any, default_reranker: CoReReranker
) -> None:
    found = retriever.invoke(QUESTION)
    configurable = retriever.configurable_fields(search_kwargs=ConfigurableField("search"))

    async def find(_: str) -> list[Document]:
        return found

    for inner in (
        RunnableLambda(lambda _: found),
        RunnableLambda(lambda _: 1 / 0).with_fallbacks([retriever]),
        retriever.with_config(tags=["inner"]),
    ):
        chain = create_rag_chain(inner, reranker=default_reranker)
        assert len(chain.invoke(QUESTION)["candidates"]) == 20
        assert len((await chain.ainvoke(QUESTION))["candidates"]) == 20
    only_async = create_rag_chain(RunnableLambda(find), reranker=default_reranker)
    assert len((await only_async.ainvoke(QUESTION))["candidates"]) == 20
    chain = create_rag_chain(configurable, reranker=default_reranker)
    three: Any = {"configurable": {"search": {"k": 3}}}
    assert len(chain.invoke(QUESTION, three)["candidates"]) == 3
    assert len((await chain.ainvoke(QUESTION, three))["candidates"]) == 3


def test_without_reranking_no_model_is_loaded(
    retriever: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_model(*_: Any, **__: Any) -> None:
        pytest.fail("a model is loaded")

    monkeypatch.setattr(CoReReranker, "__init__", no_model)
    assert create_rag_chain(retriever, rerank=False).invoke(QUESTION)["answer"]
    with pytest.raises(InvalidInputError, match="top_n"):
        create_rag_chain(retriever, rerank=False, top_n=0)


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
