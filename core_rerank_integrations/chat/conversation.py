"""Questions and what came of them: a turn grows while the chain streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from core_rerank_integrations.chat.generators import Generator
from core_rerank_integrations.chat.knowledge import KnowledgeBase
from core_rerank_integrations.errors import CoReError, InvalidInputError, requires_extra
from core_rerank_integrations.heads.scoring_config import Threshold
from core_rerank_integrations.integrations.rag.langchain import RagOutput, create_rag_chain
from core_rerank_integrations.reranker import CoReReranker

with requires_extra("chat"):
    from langchain_core.documents import Document
    from langchain_core.messages import AIMessage, BaseMessage, HumanMessage

MAX_QUESTION_CHARACTERS = 2000


@dataclass(frozen=True)
class Wishes:
    """What a visitor set.

    Attributes:
        candidates: Passages that the first stage finds.
        top_n: Passages that the answer is drawn from, at most.
        score_threshold: Probability that the best one must reach; ``"auto"`` leaves it to the
            heads, ``None`` always answers.
        extract: Share of each passage that a model gets to read; 1 for all.
        rerank: Whether candidates are reranked.
    """

    candidates: int = 20
    top_n: int = 5
    score_threshold: Threshold = "auto"
    extract: float = 1.0
    rerank: bool = True


@dataclass
class Turn:
    """A question, and what is known of its answer so far."""

    question: str
    generator: str
    reranks: bool = True
    search: str = ""
    candidates: list[Document] = field(default_factory=list)
    reranked: list[Document] = field(default_factory=list)
    answerable: float | None = None
    documents: list[Document] = field(default_factory=list)
    answer: str = ""
    milliseconds: dict[str, float] = field(default_factory=dict)
    error: str = ""
    is_done: bool = False

    def take(self, part: RagOutput) -> None:
        """What the chain has to say next."""
        self.search = part.get("search", self.search)
        self.candidates = part.get("candidates", self.candidates)
        self.reranked = part.get("reranked", self.reranked)
        self.answerable = part.get("answerable", self.answerable)
        self.documents = part.get("documents", self.documents)
        self.answer += part.get("answer", "")
        self.milliseconds |= part.get("milliseconds", {})

    def messages(self) -> list[BaseMessage]:
        """What a model gets to read of it later."""
        if self.error:
            return []
        return [HumanMessage(self.question), AIMessage(self.answer)]


def answer(
    question: str,
    earlier: Sequence[Turn],
    knowledge: KnowledgeBase,
    reranker: CoReReranker,
    generator: Generator,
    wishes: Wishes,
) -> Iterator[Turn]:
    """Answer a question.

    Args:
        question: What is asked.
        earlier: The conversation before it.
        knowledge: What is searched.
        reranker: Ranks what is found.
        generator: Writes the answer.
        wishes: What the visitor set.

    Yields:
        The same turn, each time it has grown. What goes wrong stands in it as ``error``.
    """
    turn = Turn(question.strip(), generator.name, wishes.rerank)
    yield turn
    try:
        _check(turn.question, knowledge)
        chain = create_rag_chain(
            knowledge.retriever(wishes.candidates),
            generator.model(),
            reranker=reranker,
            rerank=wishes.rerank,
            rewrite=generator.rewrites,
            top_n=wishes.top_n,
            score_threshold=wishes.score_threshold,
            extract=wishes.extract if wishes.extract < 1 else None,
        )
        history = [message for before in earlier for message in before.messages()]
        with generator.clear_errors():
            for part in chain.stream({"question": turn.question, "history": history}):
                turn.take(part)
                yield turn
    except CoReError as error:
        turn.error = str(error)
    turn.is_done = True
    yield turn


def _check(question: str, knowledge: KnowledgeBase) -> None:
    if not question:
        raise InvalidInputError("The question is empty: write one.")
    if len(question) > MAX_QUESTION_CHARACTERS:
        raise InvalidInputError(
            f"The question has {len(question):,} characters, and {MAX_QUESTION_CHARACTERS:,} are "
            "read at most: shorten it, or add the text as a document."
        )
    if not len(knowledge):
        raise InvalidInputError("There are no documents to answer from: add some under Documents.")
