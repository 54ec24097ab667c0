"""A RAG chain for LangChain: rewrite, retrieve, rerank, answer with citations."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from functools import reduce
from operator import add, itemgetter
from typing import Any, TypedDict, cast

from core_rerank_integrations.errors import requires_extra
from core_rerank_integrations.heads.scoring_config import FirstStage
from core_rerank_integrations.integrations.langchain import DocumentRanker
from core_rerank_integrations.integrations.rag.extracts import RankedPassage, extracted_answer
from core_rerank_integrations.integrations.rag.inputs import check_question, checked_options
from core_rerank_integrations.integrations.rag.prompts import (
    ANSWER_INSTRUCTION,
    HISTORY_MESSAGES,
    NO_ANSWER,
    REWRITE_INSTRUCTION,
    follow_up_search,
    passage_name,
    question_with_passages,
)
from core_rerank_integrations.ranking import passes
from core_rerank_integrations.reranker import CoReReranker
from core_rerank_integrations.results import RerankResults
from core_rerank_integrations.settings import RerankOptions, Threshold

with requires_extra("langchain"):
    from langchain_core.documents import Document
    from langchain_core.language_models import BaseChatModel
    from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.retrievers import BaseRetriever
    from langchain_core.runnables import Runnable, RunnableGenerator, RunnableLambda
    from langchain_core.runnables.utils import AddableDict


class RagInput(TypedDict):
    """A question, and the conversation before it."""

    question: str
    history: Sequence[BaseMessage]


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
    retriever: BaseRetriever,
    llm: BaseChatModel | None = None,
    *,
    reranker: CoReReranker | None = None,
    first_stage: FirstStage | None = "dense",
    rerank: bool = True,
    rewrite: bool = True,
    top_n: int = 5,
    score_threshold: Threshold | None = "auto",
    extract: float | None = None,
) -> Runnable[RagInput, RagOutput]:
    """Create a chain that answers questions from reranked documents.

    The ``llm`` rewrites a follow-up question so that it can be searched for by itself. Without one,
    a short question is searched for together with the question before it, which is wrong if the
    subject has changed.

    Examples:
        >>> chain = create_rag_chain(store.as_retriever(search_kwargs={"k": 20}), ChatOpenAI())
        >>> for part in chain.stream({"question": "Who founded the museum?", "history": []}):
        ...     print(part.get("answer", ""), end="")

    Args:
        retriever: Finds the candidates; it should find more than ``top_n``.
        llm: Writes the answer. ``None`` answers with the best sentences of the documents, by the
            reranker's evidence; nothing is generated.
        reranker: A reranker to share; ``None`` creates the default one.
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
        A runnable that takes a `RagInput` and streams a `RagOutput`.

    Raises:
        InvalidInputError: ``top_n`` is less than 1, or ``score_threshold`` is not a probability.
            Calls raise it if the question is empty.
    """
    reranker, options = checked_options(
        reranker, top_n=top_n, score_threshold=score_threshold, first_stage=first_stage
    )
    ranker = _CandidateRanker(
        reranker=reranker,
        first_stage=first_stage,
        evidence=True,
        extract=extract if llm else None,
        limits=options,
    )

    def search(state: RagInput) -> Any:
        if not (llm and rewrite and state["history"]):
            return _joined_search(state)
        rewritten = RunnableLambda(_rewrite_prompt) | llm | StrOutputParser()
        return rewritten | (lambda text: text.strip() or state["question"])

    def first(candidates: list[Document]) -> AddableDict:
        return AddableDict(candidates=candidates, documents=candidates[:top_n])

    def answer(state: dict[str, Any]) -> Any:
        if not state["documents"]:
            return NO_ANSWER
        return RunnableLambda(_answer_prompt) | llm | StrOutputParser() if llm else _extracts(state)

    ranking = [("reranked", _ranking_inputs, ranker.runnable())] if rerank else []
    # Stages: key of the output, input, runnable. Runnables that a function returns are run, too.
    stages: list[tuple[str, Callable[[AddableDict], Any], Runnable[Any, Any]]] = [
        ("search", _keys("question", "history"), RunnableLambda(search)),
        ("candidates", itemgetter("search"), retriever if rerank else retriever | first),
        *ranking,
        ("answer", _keys("question", "history", "documents"), RunnableLambda(answer)),
    ]

    def stream(chunks: Iterator[RagInput]) -> Iterator[AddableDict]:
        state = _checked_input(chunks)
        for name, select, runnable in stages:
            start = time.perf_counter()
            for output in runnable.stream(select(state)):
                part = _part(name, output)
                state += part
                yield part
            yield _time(name, start)

    async def astream(chunks: AsyncIterator[RagInput]) -> AsyncIterator[AddableDict]:
        state = _checked_input([chunk async for chunk in chunks])
        for name, select, runnable in stages:
            start = time.perf_counter()
            async for output in runnable.astream(select(state)):
                part = _part(name, output)
                state += part
                yield part
            yield _time(name, start)

    chain = RunnableGenerator[Any, Any](stream, astream, name="CoReRag")
    return cast("Runnable[RagInput, RagOutput]", chain)


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
        scoring = self._loaded_reranker().heads.scoring
        documents = [
            document
            for document, result in zip(reranked, results, strict=True)
            if passes(result, results.answerability, scoring, self.limits)
        ]
        part["documents"] = documents[: self.limits.top_n]
        return part


def _part(name: str, output: Any) -> AddableDict:
    """Return output of a stage under its key, unless it has keys of its own."""
    return output if isinstance(output, AddableDict) else AddableDict({name: output})


def _time(name: str, start: float) -> AddableDict:
    milliseconds = 1000 * (time.perf_counter() - start)
    return AddableDict(milliseconds=AddableDict({name: milliseconds}))


def _checked_input(chunks: Iterable[RagInput]) -> AddableDict:
    """Return the input of the chain, which arrives in pieces if another runnable streams it."""
    state = reduce(add, chunks)
    check_question(state.get("question"))
    history = list(state.get("history") or [])
    return AddableDict(question=state["question"].strip(), history=history)


def _keys(*names: str) -> Callable[[AddableDict], dict[str, Any]]:
    return lambda state: {name: state[name] for name in names}


def _ranking_inputs(state: AddableDict) -> dict[str, Any]:
    return {"query": state["search"], "documents": state["candidates"]}


def _joined_search(state: RagInput) -> str:
    earlier = [message.text for message in state["history"] if isinstance(message, HumanMessage)]
    return follow_up_search(state["question"], earlier)


def _rewrite_prompt(state: RagInput) -> list[BaseMessage]:
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
