"""A RAG chain for LangChain: rewrite, retrieve, rerank, answer with citations."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from operator import add, itemgetter
from typing import Any, NotRequired, TypedDict, cast

from core_rerank_integrations.errors import InvalidInputError, requires_extra
from core_rerank_integrations.heads.scoring_config import FirstStage
from core_rerank_integrations.integrations.fields import Reranker
from core_rerank_integrations.integrations.langchain import DocumentRanker
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

with requires_extra("langchain"):
    from langchain_core.documents import Document
    from langchain_core.language_models import BaseChatModel
    from langchain_core.messages import (
        BaseMessage,
        HumanMessage,
        MessageLikeRepresentation,
        SystemMessage,
        convert_to_messages,
    )
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.retrievers import RetrieverLike
    from langchain_core.runnables import Runnable, RunnableGenerator, RunnableLambda
    from langchain_core.runnables.utils import AddableDict


class RagInput(TypedDict):
    """A question, and the conversation before it: messages, or what LangChain takes for messages.

    `create_rag_chain` also takes the question alone, as a string.
    """

    question: str
    history: NotRequired[Sequence[MessageLikeRepresentation]]


class RagOutput(TypedDict, total=False):
    """The output of `create_rag_chain`: ``invoke`` returns all of it, ``stream`` its parts.

    Attributes:
        search: The search query: the question, or a rewritten follow-up.
        candidates: The documents that the retriever found, in its order.
        reranked: All candidates in the reranker's order, with probability and evidence.
        answerable: Probability that the candidates hold an answer, if the heads know it; see
            `RerankResults.answerability`.
        documents: The documents that the answer is drawn from, and that its ``[1]`` cites; empty
            if nothing answers.
        answer: The answer; the stream has it piece by piece.
        milliseconds: Time that ``search``, ``candidates``, ``reranked`` and ``answer`` took.
    """

    search: str
    candidates: list[Document]
    reranked: list[Document]
    answerable: float
    documents: list[Document]
    answer: str
    milliseconds: dict[str, float]


def create_rag_chain(
    retriever: RetrieverLike,
    llm: BaseChatModel | None = None,
    *,
    reranker: Reranker | None = None,
    first_stage: FirstStage | None = "dense",
    rerank: bool = True,
    rewrite: bool = True,
    top_n: int = 5,
    score_threshold: Threshold | None = "auto",
    extract: float | None = None,
) -> Runnable[RagInput | str, RagOutput]:
    """Create a chain that answers questions from reranked documents.

    The ``llm`` rewrites a follow-up question so that it can be searched for by itself. Without one,
    or if its answer is empty, a question whose words refer to the one before is searched for
    together with it.

    Examples:
        >>> chain = create_rag_chain(store.as_retriever(search_kwargs={"k": 20}), ChatOpenAI())
        >>> for part in chain.stream({"question": "Who founded the museum?", "history": []}):
        ...     print(part.get("answer", ""), end="")
        >>> chain.invoke("Who founded the museum?")["answer"]

    Args:
        retriever: Finds the candidates; it should find more than ``top_n``.
        llm: Writes the answer. ``None`` answers with the best sentences of the documents, by the
            reranker's evidence; nothing is generated.
        reranker: A reranker to share, or that of a server; ``None`` creates the default one.
        first_stage: What orders the candidates: ``"bm25"``, ``"dense"`` or ``"other"``; ``None``
            if nothing does.
        rerank: Whether to rerank the candidates; ``False`` keeps the retriever's order.
        rewrite: Whether the ``llm`` rewrites follow-ups. Very small models make them worse.
        top_n: Maximum number of documents that the answer is drawn from.
        score_threshold: Minimum probability of these documents. If none is left, the answer is
            `NO_ANSWER` and the ``llm`` is not called. ``"auto"`` uses the answerability of the
            candidates. Heads that do not know it, and ``None``, always answer.
        extract: Maximum share of each document's tokens that the ``llm`` reads, in its best
            sentences; ``None`` for the whole document.

    Returns:
        A runnable that takes a question or a `RagInput`, and streams a `RagOutput`.

    Raises:
        InvalidInputError: ``top_n`` is less than 1, or ``score_threshold`` is not a probability.
            Or it is a number and the heads are not calibrated; with a server, calls raise that.
            Calls also raise it if the question is empty, or the history is not one of messages.
    """
    options = RerankOptions.checked(
        top_n=top_n, score_threshold=score_threshold, first_stage=first_stage
    )
    ranking: list[tuple[str, Callable[[AddableDict], Any], Runnable[Any, Any]]] = []
    if rerank:
        ranker = _CandidateRanker(
            reranker=checked_reranker(reranker, options),
            first_stage=first_stage,
            evidence=True,
            extract=extract if llm else None,
            limits=options,
        )
        ranking = [("reranked", _ranking_inputs, ranker.runnable())]

    def search(state: dict[str, Any]) -> Any:
        if not (llm and rewrite and state["history"]):
            return _joined_search(state)
        rewritten = RunnableLambda(_rewrite_prompt) | llm | StrOutputParser()
        return rewritten | (lambda text: text.strip() or _joined_search(state))

    def first(candidates: list[Document]) -> AddableDict:
        return AddableDict(candidates=candidates, documents=candidates[:top_n])

    def answer(state: dict[str, Any]) -> Any:
        if not state["documents"]:
            return NO_ANSWER
        return RunnableLambda(_answer_prompt) | llm | StrOutputParser() if llm else _extracts(state)

    # Stages: key of the output, input, runnable. Runnables that a function returns are run, too.
    stages: list[tuple[str, Callable[[AddableDict], Any], Runnable[Any, Any]]] = [
        ("search", _keys("question", "history"), RunnableLambda(search)),
        ("candidates", itemgetter("search"), retriever if rerank else retriever | first),
        *ranking,
        ("answer", _keys("question", "history", "documents"), RunnableLambda(answer)),
    ]

    def stream(chunks: Iterator[RagInput | str]) -> Iterator[AddableDict]:
        state = _checked_input(chunks)
        for name, select, runnable in stages:
            start = time.perf_counter()
            for output in runnable.stream(select(state)):
                part = _part(name, output)
                state += part
                yield part
            yield _time(name, start)

    async def astream(chunks: AsyncIterator[RagInput | str]) -> AsyncIterator[AddableDict]:
        state = _checked_input([chunk async for chunk in chunks])
        for name, select, runnable in stages:
            start = time.perf_counter()
            async for output in runnable.astream(select(state)):
                part = _part(name, output)
                state += part
                yield part
            yield _time(name, start)

    chain = RunnableGenerator[Any, Any](stream, astream, name="CoReRag")
    return cast("Runnable[RagInput | str, RagOutput]", chain)


class _CandidateRanker(DocumentRanker):
    """Rerank all candidates, and choose the documents that the answer is drawn from."""

    limits: RerankOptions

    def runnable(self) -> RunnableLambda[dict[str, Any], AddableDict]:
        return self._run("CoReDocumentCompressor", self._chosen)

    def _chosen(self, candidates: Sequence[Document], results: RerankResults) -> AddableDict:
        reranked = self._copies(candidates, results)
        part = AddableDict(reranked=reranked)
        if results.answerability is not None:
            part["answerable"] = results.answerability
        by_index = {
            result.index: document for result, document in zip(results, reranked, strict=True)
        }
        kept = answering(results, self.limits)
        part["documents"] = [by_index[result.index] for result in kept]
        return part


def _part(name: str, output: Any) -> AddableDict:
    """Return output of a stage under its key, unless it has keys of its own."""
    return output if isinstance(output, AddableDict) else AddableDict({name: output})


def _time(name: str, start: float) -> AddableDict:
    milliseconds = 1000 * (time.perf_counter() - start)
    return AddableDict(milliseconds=AddableDict({name: milliseconds}))


def _checked_input(chunks: Iterable[RagInput | str]) -> AddableDict:
    """Return the input of the chain, which arrives in pieces if another runnable streams it.

    Raises:
        InvalidInputError: It is not a question or a `RagInput`.
    """
    whole: Any = reduce(add, chunks)
    if isinstance(whole, str):
        whole = {"question": whole}
    if not isinstance(whole, Mapping) or "question" not in whole:
        raise InvalidInputError(
            "the input must be a question, or a dictionary with the key 'question' and perhaps "
            f"'history', got {whole!r}"
        )
    check_question(whole["question"])
    return AddableDict(
        question=whole["question"].strip(), history=_messages(whole.get("history") or [])
    )


def _messages(history: Any) -> list[BaseMessage]:
    try:
        if isinstance(history, str | Mapping):  # Its characters or keys would become messages.
            raise TypeError
        return convert_to_messages(history)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise InvalidInputError(
            "history must be a list of messages, such as HumanMessage('...'), ('user', '...') or "
            f"{{'role': 'user', 'content': '...'}}, got {history!r}"
        ) from error


def _keys(*names: str) -> Callable[[AddableDict], dict[str, Any]]:
    return lambda state: {name: state[name] for name in names}


def _ranking_inputs(state: AddableDict) -> dict[str, Any]:
    return {"query": state["search"], "documents": state["candidates"]}


def _joined_search(state: dict[str, Any]) -> str:
    users = ("human", "user")
    earlier = [
        message.text
        for message in state["history"]
        if message.type in users or getattr(message, "role", None) in users
    ]
    return follow_up_search(state["question"], earlier)


def _rewrite_prompt(state: dict[str, Any]) -> list[BaseMessage]:
    history = state["history"][-HISTORY_MESSAGES:]
    return [SystemMessage(REWRITE_INSTRUCTION), *history, HumanMessage(state["question"])]


def _answer_prompt(state: dict[str, Any]) -> list[BaseMessage]:
    passages = [
        (passage_name(document.metadata), document.page_content) for document in state["documents"]
    ]
    question = HumanMessage(question_with_passages(state["question"], passages))
    return [SystemMessage(ANSWER_INSTRUCTION), *state["history"][-HISTORY_MESSAGES:], question]


def _extracts(state: dict[str, Any]) -> str:
    return extracted_answer(
        [
            RankedPassage.from_metadata(
                document.page_content, document.metadata.get("relevance_score"), document.metadata
            )
            for document in state["documents"]
        ]
    )
