"""A RAG chain for LangChain: rewrite, retrieve, rerank, answer with citations."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import reduce
from operator import add
from typing import Any, TypedDict, cast

from core_rerank_integrations.checks import check_count, check_threshold
from core_rerank_integrations.errors import InvalidInputError, requires_extra
from core_rerank_integrations.heads.scoring_config import Ranked, Threshold
from core_rerank_integrations.integrations.langchain import CoReDocumentCompressor
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
from core_rerank_integrations.reranker import CoReReranker

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
    """What `create_rag_chain` streams, a key or two at a time; ``invoke`` returns all of it.

    Attributes:
        search: What was searched for: the question, rewritten where it follows up another.
        candidates: What the retriever found, in its order.
        reranked: All of these in the reranker's order, with their probability and evidence.
        answerable: How probable it is that an answer is among them, where the heads know.
        documents: Those that the answer is drawn from, and that its ``[1]`` cites; none where
            nothing answers.
        answer: The answer, piece by piece.
        milliseconds: What ``search``, ``candidates``, ``reranked`` and ``answer`` took.
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
    ranked: Ranked = "vectors",
    rerank: bool = True,
    rewrite: bool = True,
    top_n: int = 5,
    score_threshold: Threshold = "auto",
    extract: float | None = None,
) -> Runnable[RagInput, RagOutput]:
    """Answers to questions, from what a retriever finds and this package reranks.

    A question that follows up others is rewritten by the ``llm``, so that it can be searched for
    by itself. Without one, a short question is searched for together with the one before it:
    simple, and wrong where the subject has changed.

    Examples:
        >>> chain = create_rag_chain(store.as_retriever(search_kwargs={"k": 20}), ChatOpenAI())
        >>> for part in chain.stream({"question": "Who founded the museum?", "history": []}):
        ...     print(part.get("answer", ""), end="")

    Args:
        retriever: Finds the candidates, more than are wanted.
        llm: Writes the answer. ``None`` answers with the passages' own sentences, those that the
            reranker's evidence is strongest for; nothing is generated then.
        reranker: One to share; ``None`` makes the default one.
        ranked: What the retriever is: ``"vectors"``, ``"bm25"``, or ``True`` for anything else.
        rerank: Whether candidates are reranked; ``False`` answers from the retriever's order.
        rewrite: Whether the ``llm`` rewrites follow-ups. Very small models do more harm than good.
        top_n: Passages that the answer is drawn from, at most.
        score_threshold: Passages of a lower probability are left out. Where none is left, nothing
            answers, and the ``llm`` is not asked. ``"auto"`` asks `CoReReranker.answerable`, and
            always answers with heads that do not know; so does ``None``.
        extract: Share of each passage's tokens that the ``llm`` gets to read, in its strongest
            sentences; ``None`` for all.

    Returns:
        A runnable that takes a `RagInput` and streams a `RagOutput`.

    Raises:
        InvalidInputError: ``top_n`` is less than 1, or ``score_threshold`` no probability.
            Called: the question is empty.
    """
    check_count("top_n", top_n)
    reranker = reranker or CoReReranker()
    abstention = reranker.heads.scoring.abstention
    if score_threshold == "auto" and abstention is None:
        score_threshold = None
    check_threshold(score_threshold, reranker.heads.scoring)
    compressor = CoReDocumentCompressor(
        reranker=reranker, ranked=ranked, evidence=True, extract=extract if llm else None
    )
    answer: Runnable[dict[str, Any], str] = (
        RunnableLambda(_answer_prompt) | llm | StrOutputParser()
        if llm
        else RunnableLambda(_extracts)
    )
    search: Runnable[RagInput, str] = (
        RunnableLambda(_rewrite_prompt) | llm | StrOutputParser() | str.strip
        if llm and rewrite
        else RunnableLambda(_joined_search)
    )

    def judged(documents: list[Document]) -> AddableDict:
        """How probable an answer is, and the documents that it is to be drawn from."""
        relevance = [document.metadata["relevance_score"] for document in documents]
        told = AddableDict(answerable=abstention.probability(relevance) if abstention else None)
        if score_threshold == "auto":
            documents = documents if told["answerable"] >= reranker.abstention_threshold else []
        elif score_threshold is not None:
            documents = [
                document
                for document, given in zip(documents, relevance, strict=True)
                if given >= score_threshold
            ]
        return AddableDict(told if abstention else {}, documents=documents[:top_n])

    def stream(chunks: Iterator[RagInput]) -> Iterator[AddableDict]:
        given = _checked(chunks)
        lap = _stopwatch()
        rewritten = search.invoke(given) if given["history"] else ""
        query = rewritten or given["question"]
        yield lap(search=query)
        candidates = retriever.invoke(query)
        yield lap(candidates=candidates)
        chosen = AddableDict(documents=candidates[:top_n])
        if rerank:
            reranked = list(compressor.compress_documents(candidates, query))
            yield lap(reranked=reranked)
            chosen = judged(reranked)
        yield chosen
        if chosen["documents"]:
            for piece in answer.stream({**given, "documents": chosen["documents"]}):
                yield AddableDict(answer=piece)
        else:
            yield AddableDict(answer=NO_ANSWER)
        yield lap(answer="")

    async def astream(chunks: AsyncIterator[RagInput]) -> AsyncIterator[AddableDict]:
        given = _checked([chunk async for chunk in chunks])
        lap = _stopwatch()
        rewritten = await search.ainvoke(given) if given["history"] else ""
        query = rewritten or given["question"]
        yield lap(search=query)
        candidates = await retriever.ainvoke(query)
        yield lap(candidates=candidates)
        chosen = AddableDict(documents=candidates[:top_n])
        if rerank:
            reranked = list(await compressor.acompress_documents(candidates, query))
            yield lap(reranked=reranked)
            chosen = judged(reranked)
        yield chosen
        if chosen["documents"]:
            async for piece in answer.astream({**given, "documents": chosen["documents"]}):
                yield AddableDict(answer=piece)
        else:
            yield AddableDict(answer=NO_ANSWER)
        yield lap(answer="")

    chain = RunnableGenerator[Any, Any](stream, astream, name="CoReRag")
    return cast("Runnable[RagInput, RagOutput]", chain)


def _checked(chunks: Any) -> RagInput:
    """What was asked, which arrives in pieces where another runnable streams it."""
    given = reduce(add, chunks)
    question = given.get("question")
    if not isinstance(question, str) or not question.strip():
        raise InvalidInputError(f"the question must be a text that is not empty, got {question!r}")
    return {"question": question.strip(), "history": list(given.get("history") or [])}


def _stopwatch() -> Any:
    """Adds to what a stage gives the milliseconds since the one before it."""
    last = time.perf_counter()

    def lap(**given: Any) -> AddableDict:
        nonlocal last
        started, last = last, time.perf_counter()
        (stage,) = given
        return AddableDict(given, milliseconds=AddableDict({stage: 1000 * (last - started)}))

    return lap


def _joined_search(given: RagInput) -> str:
    asked = [message.text for message in given["history"] if isinstance(message, HumanMessage)]
    return follow_up_search(given["question"], asked)


def _rewrite_prompt(given: RagInput) -> list[BaseMessage]:
    history = list(given["history"])[-REMEMBERED_MESSAGES:]
    return [SystemMessage(REWRITE_INSTRUCTION), *history, HumanMessage(given["question"])]


def _answer_prompt(given: dict[str, Any]) -> list[BaseMessage]:
    passages = [
        (passage_name(document.metadata), document.page_content) for document in given["documents"]
    ]
    question = HumanMessage(question_with_passages(given["question"], passages))
    return [SystemMessage(ANSWER_INSTRUCTION), *given["history"][-REMEMBERED_MESSAGES:], question]


def _extracts(given: dict[str, Any]) -> str:
    return extracted_answer(
        [
            RankedPassage(
                document.page_content,
                document.metadata.get("relevance_score", 0.0),
                document.metadata.get("evidence", ()),
            )
            for document in given["documents"]
        ]
    )
