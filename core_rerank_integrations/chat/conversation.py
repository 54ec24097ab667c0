"""The turns of a conversation: each question, its candidates, and its answer."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from core_rerank_integrations.chat.generators import EXTRACTS, Generator
from core_rerank_integrations.chat.knowledge import KnowledgeBase, KnowledgeRetriever
from core_rerank_integrations.errors import (
    CoReError,
    GeneratorError,
    InvalidInputError,
    requires_extra,
)
from core_rerank_integrations.integrations.rag.langchain import (
    RagInput,
    RagOutput,
    create_rag_chain,
)
from core_rerank_integrations.reranker import CoReReranker

with requires_extra("chat"):
    from langchain_core.documents import Document
    from langchain_core.language_models import BaseChatModel
    from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
    from langchain_core.runnables import Runnable

MAX_QUESTION_CHARACTERS = 2000
UNANSWERED = "(There was no answer.)"
"""What a model reads for the answer of a turn that failed, because roles must alternate."""


@dataclass(frozen=True)
class ChatSettings:
    """Settings of a visitor.

    Attributes:
        generator: What writes the answer.
        rerank: Whether candidates are reranked.
        candidates: Number of passages from the first stage.
        top_n: Maximum number of passages that the answer is drawn from.
        abstain: Whether to answer nothing if the answerability of all candidates is too low.
            ``min_probability`` is then ignored.
        min_probability: Minimum probability of a passage; 0 keeps all.
        extract: Share of each passage that a language model reads; 1 for all.
    """

    generator: Generator = EXTRACTS
    rerank: bool = True
    candidates: int = 20
    top_n: int = 5
    abstain: bool = True
    min_probability: float = 0.0
    extract: float = 1.0


@dataclass
class Turn:
    """A question and what the chain has returned for it so far; see `RagOutput`."""

    question: str
    generator: str
    rerank: bool = True
    search: str = ""
    candidates: list[Document] = field(default_factory=list)
    reranked: list[Document] = field(default_factory=list)
    answerable: float | None = None
    documents: list[Document] = field(default_factory=list)
    answer: str = ""
    milliseconds: dict[str, float] = field(default_factory=dict)
    error: str = ""
    is_done: bool = False

    def update(self, part: RagOutput) -> None:
        """Add a part of the output of the chain."""
        self.search = part.get("search", self.search)
        self.candidates = part.get("candidates", self.candidates)
        self.reranked = part.get("reranked", self.reranked)
        self.answerable = part.get("answerable", self.answerable)
        self.documents = part.get("documents", self.documents)
        self.answer += part.get("answer", "")
        self.milliseconds |= part.get("milliseconds", {})

    def messages(self) -> list[BaseMessage]:
        """Return the turn as messages for a language model; none if the question was invalid."""
        if not self.candidates:
            return []
        return [HumanMessage(self.question), AIMessage(self.answer.strip() or UNANSWERED)]


def answer(
    question: str,
    history: Sequence[Turn],
    knowledge: KnowledgeBase,
    reranker: CoReReranker,
    settings: ChatSettings,
) -> Iterator[Turn]:
    """Answer a question.

    Args:
        question: The question.
        history: The conversation before it.
        knowledge: The documents.
        reranker: Ranks the candidates.
        settings: Settings of the visitor.

    Yields:
        The same turn each time it has changed. Its ``error`` holds the message of an error.
    """
    generator = settings.generator
    turn = Turn(question.strip(), generator.name, settings.rerank)
    yield turn
    try:
        _check(turn.question, knowledge)
        messages = [message for earlier in history for message in earlier.messages()]
        chain_input: RagInput = {"question": turn.question, "history": messages}
        try:
            with generator.clear_errors():
                chain = _chain(knowledge, reranker, settings, generator.load())
                for part in chain.stream(chain_input):
                    turn.update(part)
                    yield turn
                if not turn.answer.strip():
                    turn.error = str(generator.failure("the answer is empty"))
        except GeneratorError as error:
            turn.error = str(error)
            if not turn.candidates:  # Rewriting the question has failed.
                for part in _chain(knowledge, reranker, settings, None).stream(chain_input):
                    part.pop("answer", None)
                    turn.update(part)
                    yield turn
    except CoReError as error:
        turn.error = str(error)
    except Exception as error:
        # Without this, the page would wait for ever.
        logging.getLogger(__name__).exception("A question could not be answered")
        turn.error = f"This question could not be answered ({error!r}): ask it in other words."
    turn.is_done = True
    yield turn


def _chain(
    knowledge: KnowledgeBase,
    reranker: CoReReranker,
    settings: ChatSettings,
    llm: BaseChatModel | None,
) -> Runnable[RagInput, RagOutput]:
    return create_rag_chain(
        KnowledgeRetriever(knowledge=knowledge, k=settings.candidates),
        llm,
        reranker=reranker,
        rerank=settings.rerank,
        rewrite=settings.generator.rewrites,
        top_n=settings.top_n,
        score_threshold="auto" if settings.abstain else settings.min_probability or None,
        extract=settings.extract if settings.extract < 1 else None,
    )


def _check(question: str, knowledge: KnowledgeBase) -> None:
    if not question:
        raise InvalidInputError("The question is empty: write one.")
    if len(question) > MAX_QUESTION_CHARACTERS:
        raise InvalidInputError(
            f"The question has {len(question):,} characters, and at most "
            f"{MAX_QUESTION_CHARACTERS:,} are read: shorten it, or add the text as a document."
        )
    if not len(knowledge):
        raise InvalidInputError("There are no documents to answer from: add some under Documents.")
