"""A RAG chat engine for LlamaIndex: rewrite, retrieve, rerank, answer with citations."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from threading import Thread
from typing import Any, NamedTuple

from core_rerank_integrations.errors import requires_extra
from core_rerank_integrations.heads.scoring_config import FirstStage
from core_rerank_integrations.integrations.fields import Reranker
from core_rerank_integrations.integrations.llama_index import CoReNodePostprocessor
from core_rerank_integrations.integrations.rag.extracts import RankedPassage, extracted_answer
from core_rerank_integrations.integrations.rag.inputs import (
    answering,
    check_question,
    checked_reranker,
)
from core_rerank_integrations.integrations.rag.prompts import (
    ANSWER_INSTRUCTION,
    HISTORY_MESSAGES,
    NO_ANSWER,
    REWRITE_INSTRUCTION,
    follow_up_search,
    passage_name,
    question_with_passages,
)
from core_rerank_integrations.results import RerankResults
from core_rerank_integrations.settings import RerankOptions, Threshold

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
    reranker: Reranker | None = None,
    first_stage: FirstStage | None = "dense",
    rewrite: bool = True,
    top_n: int = 5,
    score_threshold: Threshold | None = "auto",
    extract: float | None = None,
    memory: BaseMemory | None = None,
) -> CoReChatEngine:
    """Create a chat engine that answers questions from reranked nodes.

    The ``llm`` rewrites a follow-up question so that it can be searched for by itself. Without one,
    or if its answer is empty, a question whose words refer to the one before is searched for
    together with it.

    Examples:
        >>> engine = create_rag_chat_engine(index.as_retriever(similarity_top_k=20), Settings.llm)
        >>> response = engine.chat("Who founded the museum?")
        >>> print(response, [node.metadata for node in response.source_nodes])

    Args:
        retriever: Finds the candidates; it should find more than ``top_n``.
        llm: Writes the answer. ``None`` answers with the best sentences of the nodes, by the
            reranker's evidence; nothing is generated.
        reranker: A reranker to share, or that of a server; ``None`` creates the default one.
        first_stage: What orders the candidates: ``"bm25"``, ``"dense"`` or ``"other"``; ``None``
            if nothing does.
        rewrite: Whether the ``llm`` rewrites follow-ups. Very small models make them worse.
        top_n: Maximum number of nodes that the answer is drawn from.
        score_threshold: Minimum probability of these nodes. If none is left, the answer is
            `NO_ANSWER` and the ``llm`` is not called. ``"auto"`` uses the answerability of the
            candidates. Heads that do not know it, and ``None``, always answer.
        extract: Maximum share of each node's tokens that the ``llm`` reads, in its best sentences;
            ``None`` for the whole node.
        memory: Memory of the conversation; ``None`` creates one.

    Raises:
        InvalidInputError: ``top_n`` is less than 1, or ``score_threshold`` is not a probability.
            Or it is a number and the heads are not calibrated; with a server, calls raise that.
            Calls also raise it if the question is empty.
    """
    options = RerankOptions.checked(
        top_n=top_n, score_threshold=score_threshold, first_stage=first_stage
    )
    postprocessor = _CandidatePostprocessor(
        reranker=checked_reranker(reranker, options),
        first_stage=first_stage,
        evidence=llm is None,
        extract=extract if llm else None,
        limits=options,
    )
    return CoReChatEngine(retriever, postprocessor, llm, rewrite, memory or Memory.from_defaults())


# Not LlamaIndex's CondensePlusContextChatEngine: it stores a question before its answer, so that a
# failed answer leaves two questions in a row, which many chat templates refuse. In versions that
# are supported here, it also calls the postprocessor's blocking method in a coroutine.
class CoReChatEngine(BaseChatEngine):
    """The chat engine of `create_rag_chat_engine`, with the methods of LlamaIndex's chat engines.

    ``response.source_nodes`` are the nodes that the answer is drawn from and that its ``[1]``
    cites; empty if nothing answers. ``response.sources`` holds the search query.
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
        """Delete the conversation."""
        self._memory.reset()

    @trace_method("chat")
    def chat(self, message: str, chat_history: History = None) -> AgentChatResponse:
        """Answer a question.

        Args:
            message: The question; not empty.
            chat_history: A conversation that replaces the one in memory.
        """
        turn = self._retrieve(message, chat_history)
        if self._llm and turn.nodes:
            answer = _content(self._llm.chat(turn.prompt()))
        else:
            answer = turn.extracts()
        self._memory.put_messages([_message("user", message), _message("assistant", answer)])
        return AgentChatResponse(answer, **turn.sources())

    @trace_method("chat")
    async def achat(self, message: str, chat_history: History = None) -> AgentChatResponse:
        """Answer a question without blocking the event loop; see `chat`."""
        turn = await self._aretrieve(message, chat_history)
        if self._llm and turn.nodes:
            answer = _content(await self._llm.achat(turn.prompt()))
        else:
            answer = turn.extracts()
        await self._memory.aput_messages([_message("user", message), _message("assistant", answer)])
        return AgentChatResponse(answer, **turn.sources())

    @trace_method("chat")
    def stream_chat(self, message: str, chat_history: History = None) -> StreamingAgentChatResponse:
        """Answer a question piece by piece, in ``response.response_gen``; see `chat`."""
        turn = self._retrieve(message, chat_history)
        pieces = self._llm.stream_chat(turn.prompt()) if self._llm and turn.nodes else None
        stream = self._storing(turn, pieces)
        response = StreamingAgentChatResponse(chat_stream=stream, **turn.sources())
        writer = Thread(target=response.write_response_to_history, args=(self._memory,))
        response.write_response_to_history_thread = writer
        writer.start()
        return response

    @trace_method("chat")
    async def astream_chat(
        self, message: str, chat_history: History = None
    ) -> StreamingAgentChatResponse:
        """Answer piece by piece, in ``response.async_response_gen()``; see `chat`."""
        turn = await self._aretrieve(message, chat_history)
        pieces = await self._llm.astream_chat(turn.prompt()) if self._llm and turn.nodes else None
        stream = self._astoring(turn, pieces)
        response = StreamingAgentChatResponse(achat_stream=stream, **turn.sources())
        writing = response.awrite_response_to_history(self._memory)
        response.awrite_response_to_history_task = asyncio.create_task(writing)
        return response

    def _storing(self, turn: _Turn, pieces: ChatResponseGen | None) -> ChatResponseGen:
        # LlamaIndex stores the answer at its end. The question is stored right before it.
        yield from pieces or [turn.piece()]
        self._memory.put(_message("user", turn.message))

    async def _astoring(
        self, turn: _Turn, pieces: ChatResponseAsyncGen | None
    ) -> ChatResponseAsyncGen:
        if pieces is None:
            yield turn.piece()
        else:
            async for piece in pieces:
                yield piece
        await self._memory.aput(_message("user", turn.message))

    def _retrieve(self, message: str, chat_history: History) -> _Turn:
        check_question(message)
        if chat_history is not None:
            self._memory.set(chat_history)
        history = self._memory.get(input=message)
        search = _joined_search(message, history)
        if history and self._rewriter:
            search = _content(self._rewriter.chat(_rewrite_prompt(message, history))) or search
        nodes = self._retriever.retrieve(search)
        nodes = self._postprocessor.postprocess_nodes(nodes, query_str=search)
        return _Turn(message, history, search, nodes)

    async def _aretrieve(self, message: str, chat_history: History) -> _Turn:
        check_question(message)
        if chat_history is not None:
            await self._memory.aset(chat_history)
        history = await self._memory.aget(input=message)
        search = _joined_search(message, history)
        if history and self._rewriter:
            reply = await self._rewriter.achat(_rewrite_prompt(message, history))
            search = _content(reply) or search
        nodes = await self._retriever.aretrieve(search)
        nodes = await self._postprocessor.apostprocess_nodes(nodes, query_str=search)
        return _Turn(message, history, search, nodes)


class _CandidatePostprocessor(CoReNodePostprocessor):
    """Rerank all candidates, and keep the nodes that the answer is drawn from."""

    limits: RerankOptions

    def _copies(
        self, nodes: Sequence[NodeWithScore], results: RerankResults
    ) -> list[NodeWithScore]:
        return super()._copies(nodes, answering(results, self.limits))


class _Turn(NamedTuple):
    """A question, the conversation before it, the search query, and the nodes that answer it."""

    message: str
    history: list[ChatMessage]
    search: str
    nodes: list[NodeWithScore]

    def prompt(self) -> list[ChatMessage]:
        passages = [(_name(node), node.node.get_content(MetadataMode.NONE)) for node in self.nodes]
        question = _message("user", question_with_passages(self.message, passages))
        instruction = _message("system", ANSWER_INSTRUCTION)
        return [instruction, *self.history[-HISTORY_MESSAGES:], question]

    def extracts(self) -> str:
        return extracted_answer(list(map(_ranked_passage, self.nodes))) if self.nodes else NO_ANSWER

    def piece(self) -> ChatResponse:
        answer = self.extracts()
        return ChatResponse(message=_message("assistant", answer), delta=answer)

    def sources(self) -> dict[str, Any]:
        search = ToolOutput(
            tool_name="retriever",
            content=str(self.nodes),
            raw_input={"message": self.search},
            raw_output=self.nodes,
        )
        return {"sources": [search], "source_nodes": self.nodes}


def _message(role: str, text: str) -> ChatMessage:
    return ChatMessage.from_str(text, role)


def _content(response: ChatResponse) -> str:
    return (response.message.content or "").strip()


def _joined_search(message: str, history: list[ChatMessage]) -> str:
    earlier = [turn.content or "" for turn in history if turn.role == MessageRole.USER]
    return follow_up_search(message, earlier)


def _rewrite_prompt(message: str, history: list[ChatMessage]) -> list[ChatMessage]:
    instruction = _message("system", REWRITE_INSTRUCTION)
    return [instruction, *history[-HISTORY_MESSAGES:], _message("user", message)]


def _name(node: NodeWithScore) -> str:
    # LlamaIndex's readers have other keys for the file and the page than LangChain's.
    names = {"source": node.metadata.get("file_name"), "page": node.metadata.get("page_label")}
    return passage_name({**names, **node.metadata})


def _ranked_passage(node: NodeWithScore) -> RankedPassage:
    text = node.node.get_content(MetadataMode.NONE)
    return RankedPassage.from_metadata(text, node.score, node.metadata)
