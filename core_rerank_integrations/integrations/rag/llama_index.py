"""A RAG chat engine for LlamaIndex: condense, retrieve, rerank, answer with citations."""

from __future__ import annotations

import asyncio
from threading import Thread
from typing import Any

from core_rerank_integrations.checks import check_count, check_threshold
from core_rerank_integrations.errors import InvalidInputError, requires_extra
from core_rerank_integrations.heads.scoring_config import Ranked, Threshold
from core_rerank_integrations.integrations.llama_index import CoReNodePostprocessor
from core_rerank_integrations.integrations.rag.extracts import RankedPassage, extracted_answer
from core_rerank_integrations.integrations.rag.prompts import (
    ANSWER_INSTRUCTION,
    NO_ANSWER,
    REMEMBERED_MESSAGES,
    REWRITE_INSTRUCTION,
    follow_up_search,
    passage_name,
    question_with_passages,
)
from core_rerank_integrations.method.evidence import Evidence
from core_rerank_integrations.method.extraction import evidence_within
from core_rerank_integrations.reranker import CoReReranker

with requires_extra("llama-index"):
    from llama_index.core.base.base_retriever import BaseRetriever
    from llama_index.core.base.llms.types import (
        ChatMessage,
        ChatResponse,
        ChatResponseAsyncGen,
        ChatResponseGen,
        MessageRole,
    )
    from llama_index.core.callbacks import trace_method
    from llama_index.core.chat_engine.types import (
        AgentChatResponse,
        BaseChatEngine,
        StreamingAgentChatResponse,
    )
    from llama_index.core.llms.llm import LLM
    from llama_index.core.memory import BaseMemory, Memory
    from llama_index.core.schema import MetadataMode, NodeWithScore
    from llama_index.core.settings import Settings
    from llama_index.core.tools import ToolOutput

History = list[ChatMessage] | None


def create_rag_chat_engine(
    retriever: BaseRetriever,
    llm: LLM | None = None,
    *,
    reranker: CoReReranker | None = None,
    ranked: Ranked = "vectors",
    rewrite: bool = True,
    top_n: int = 5,
    score_threshold: Threshold = "auto",
    extract: float | None = None,
    memory: BaseMemory | None = None,
) -> CoReChatEngine:
    """Answers to questions, from what a retriever finds and this package reranks.

    The counterpart of `rag.langchain.create_rag_chain`. A question that follows up others is
    rewritten by the ``llm``, so that it can be searched for by itself. Without one, a short
    question is searched for together with the one before it: simple, and wrong where the subject
    has changed.

    Examples:
        >>> engine = create_rag_chat_engine(index.as_retriever(similarity_top_k=20), Settings.llm)
        >>> response = engine.chat("Who founded the museum?")
        >>> print(response, [node.metadata for node in response.source_nodes])

    Args:
        retriever: Finds the candidates, more than are wanted.
        llm: Writes the answer. ``None`` answers with the passages' own sentences, those that the
            reranker's evidence is strongest for; nothing is generated then.
        reranker: One to share; ``None`` makes the default one.
        ranked: What the retriever is: ``"vectors"``, ``"bm25"``, or ``True`` for anything else.
        rewrite: Whether the ``llm`` rewrites follow-ups. Very small models do more harm than good.
        top_n: Passages that the answer is drawn from, at most.
        score_threshold: Passages of a lower probability are left out. Where none is left, nothing
            answers, and the ``llm`` is not asked. ``"auto"`` asks `CoReReranker.answerable`, and
            always answers with heads that do not know; so does ``None``.
        extract: Share of each passage's tokens that the ``llm`` gets to read, in its strongest
            sentences; ``None`` for all.
        memory: Holds the conversation; ``None`` for a new one.

    Raises:
        InvalidInputError: ``top_n`` is less than 1, or ``score_threshold`` no probability.
            Called: the question is empty.
    """
    check_count("top_n", top_n)
    reranker = reranker or CoReReranker()
    if score_threshold == "auto" and reranker.heads.scoring.abstention is None:
        score_threshold = None
    check_threshold(score_threshold, reranker.heads.scoring)
    postprocessor = CoReNodePostprocessor(
        reranker=reranker,
        ranked=ranked,
        top_n=top_n,
        score_threshold=score_threshold,
        evidence=llm is None,
        extract=extract if llm else None,
    )
    return CoReChatEngine(retriever, postprocessor, llm, rewrite, memory or Memory.from_defaults())


class CoReChatEngine(BaseChatEngine):
    """What `create_rag_chat_engine` makes, with the methods of every LlamaIndex chat engine.

    ``response.source_nodes`` are the passages that the answer is drawn from and that its ``[1]``
    cites, none where nothing answers; ``response.sources`` says what was searched for.

    Args:
        retriever: Finds the candidates.
        postprocessor: Reranks them, and says where none is good enough.
        llm: Writes the answer; ``None`` for the passages' own sentences, which takes a
            postprocessor with ``evidence=True``.
        rewrite: Whether the ``llm`` rewrites follow-ups.
        memory: Holds the conversation.
    """

    def __init__(
        self,
        retriever: BaseRetriever,
        postprocessor: CoReNodePostprocessor,
        llm: LLM | None,
        rewrite: bool,
        memory: BaseMemory,
    ) -> None:
        self._retriever = retriever
        self._postprocessor = postprocessor
        self._llm = llm
        self._rewriter = llm if rewrite else None
        self._memory = memory
        self.callback_manager = Settings.callback_manager

    @property
    def chat_history(self) -> list[ChatMessage]:
        """The conversation so far."""
        return self._memory.get_all()

    def reset(self) -> None:
        """Forget the conversation."""
        self._memory.reset()

    @trace_method("chat")
    def chat(self, message: str, chat_history: History = None) -> AgentChatResponse:
        """Answer ``message``; ``chat_history`` takes the place of what is remembered."""
        history, found = self._found(message, chat_history)
        if found.source_nodes and self._llm:
            reply = self._llm.chat(_answer_prompt(message, history, found.source_nodes))
            found.response = (reply.message.content or "").strip()
        else:
            found.response = _without_model(found.source_nodes)
        self._memory.put(_from_user(message))
        self._memory.put(_from_assistant(found.response))
        return found

    @trace_method("chat")
    async def achat(self, message: str, chat_history: History = None) -> AgentChatResponse:
        """`chat` without blocking the event loop."""
        history, found = await self._afound(message, chat_history)
        if found.source_nodes and self._llm:
            reply = await self._llm.achat(_answer_prompt(message, history, found.source_nodes))
            found.response = (reply.message.content or "").strip()
        else:
            found.response = _without_model(found.source_nodes)
        await self._memory.aput(_from_user(message))
        await self._memory.aput(_from_assistant(found.response))
        return found

    @trace_method("chat")
    def stream_chat(self, message: str, chat_history: History = None) -> StreamingAgentChatResponse:
        """`chat`, the answer piece by piece in ``response.response_gen``."""
        history, found = self._found(message, chat_history)
        if found.source_nodes and self._llm:
            pieces = self._llm.stream_chat(_answer_prompt(message, history, found.source_nodes))
        else:
            pieces = _at_once(_without_model(found.source_nodes))
        response = StreamingAgentChatResponse(
            chat_stream=self._remembering(message, pieces),
            sources=found.sources,
            source_nodes=found.source_nodes,
        )
        writer = Thread(target=response.write_response_to_history, args=(self._memory,))
        response.write_response_to_history_thread = writer
        writer.start()
        return response

    @trace_method("chat")
    async def astream_chat(
        self, message: str, chat_history: History = None
    ) -> StreamingAgentChatResponse:
        """`achat`, the answer piece by piece in ``response.async_response_gen()``."""
        history, found = await self._afound(message, chat_history)
        if found.source_nodes and self._llm:
            pieces = await self._llm.astream_chat(
                _answer_prompt(message, history, found.source_nodes)
            )
        else:
            pieces = _aat_once(_without_model(found.source_nodes))
        response = StreamingAgentChatResponse(
            achat_stream=self._aremembering(message, pieces),
            sources=found.sources,
            source_nodes=found.source_nodes,
        )
        response.awrite_response_to_history_task = asyncio.create_task(
            response.awrite_response_to_history(self._memory)
        )
        return response

    def _remembering(self, message: str, pieces: ChatResponseGen) -> ChatResponseGen:
        """A question is remembered when its answer is there: one that failed was not asked."""
        yield from pieces
        self._memory.put(_from_user(message))

    async def _aremembering(
        self, message: str, pieces: ChatResponseAsyncGen
    ) -> ChatResponseAsyncGen:
        async for piece in pieces:
            yield piece
        await self._memory.aput(_from_user(message))

    def _found(
        self, message: str, chat_history: History
    ) -> tuple[list[ChatMessage], AgentChatResponse]:
        """The conversation, and a response that has its sources and lacks its answer."""
        _check(message)
        if chat_history is not None:
            self._memory.set(chat_history)
        history = self._memory.get(input=message)
        search = _joined_search(message, history)
        if history and self._rewriter:
            reply = self._rewriter.chat(_rewrite_prompt(message, history))
            search = (reply.message.content or "").strip() or search
        nodes = self._postprocessor.postprocess_nodes(
            self._retriever.retrieve(search), query_str=search
        )
        return history, _unanswered(search, nodes)

    async def _afound(
        self, message: str, chat_history: History
    ) -> tuple[list[ChatMessage], AgentChatResponse]:
        _check(message)
        if chat_history is not None:
            await self._memory.aset(chat_history)
        history = await self._memory.aget(input=message)
        search = _joined_search(message, history)
        if history and self._rewriter:
            reply = await self._rewriter.achat(_rewrite_prompt(message, history))
            search = (reply.message.content or "").strip() or search
        nodes = await self._postprocessor.apostprocess_nodes(
            await self._retriever.aretrieve(search), query_str=search
        )
        return history, _unanswered(search, nodes)


def _check(message: Any) -> None:
    if not isinstance(message, str) or not message.strip():
        raise InvalidInputError(f"the question must be a text that is not empty, got {message!r}")


def _from_user(text: str) -> ChatMessage:
    return ChatMessage(content=text, role=MessageRole.USER)


def _from_assistant(text: str) -> ChatMessage:
    return ChatMessage(content=text, role=MessageRole.ASSISTANT)


def _from_system(text: str) -> ChatMessage:
    return ChatMessage(content=text, role=MessageRole.SYSTEM)


def _joined_search(message: str, history: list[ChatMessage]) -> str:
    asked = [earlier.content or "" for earlier in history if earlier.role == MessageRole.USER]
    return follow_up_search(message, asked)


def _rewrite_prompt(message: str, history: list[ChatMessage]) -> list[ChatMessage]:
    recent = history[-REMEMBERED_MESSAGES:]
    return [_from_system(REWRITE_INSTRUCTION), *recent, _from_user(message)]


def _answer_prompt(
    message: str, history: list[ChatMessage], nodes: list[NodeWithScore]
) -> list[ChatMessage]:
    passages = [(_name(node), node.node.get_content(MetadataMode.NONE)) for node in nodes]
    question = _from_user(question_with_passages(message, passages))
    return [_from_system(ANSWER_INSTRUCTION), *history[-REMEMBERED_MESSAGES:], question]


def _name(node: NodeWithScore) -> str:
    """LlamaIndex's readers call a file and its page otherwise than LangChain's do."""
    known = {"source": node.metadata.get("file_name"), "page": node.metadata.get("page_label")}
    return passage_name({**known, **node.metadata})


def _without_model(nodes: list[NodeWithScore]) -> str:
    return extracted_answer([_ranked_passage(node) for node in nodes]) if nodes else NO_ANSWER


def _ranked_passage(node: NodeWithScore) -> RankedPassage:
    """Evidence is told in the text that was ranked; here without the metadata before it."""
    text = node.node.get_content(MetadataMode.EMBED)
    start = max(text.rfind(node.node.get_content(MetadataMode.NONE).strip()), 0)
    sentences = [Evidence(*sentence) for sentence in node.metadata.get("evidence", ())]
    return RankedPassage(
        text[start:],
        node.score or 0.0,
        [sentence[:3] for sentence in evidence_within(sentences, start, len(text))],
    )


def _unanswered(search: str, nodes: list[NodeWithScore]) -> AgentChatResponse:
    searched = ToolOutput(
        tool_name="retriever", content=str(nodes), raw_input={"message": search}, raw_output=nodes
    )
    return AgentChatResponse(sources=[searched], source_nodes=nodes)


def _at_once(answer: str) -> ChatResponseGen:
    yield ChatResponse(message=_from_assistant(answer), delta=answer)


async def _aat_once(answer: str) -> ChatResponseAsyncGen:
    yield ChatResponse(message=_from_assistant(answer), delta=answer)
