"""Turns as HTML. The template is in ``page.html``; every value in it is escaped by `text`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from core_rerank_integrations.chat.conversation import Turn
from core_rerank_integrations.errors import requires_extra
from core_rerank_integrations.integrations.outputs import METADATA_KEY, relevance
from core_rerank_integrations.integrations.rag.prompts import NO_ANSWER, citations

with requires_extra("chat"):
    from jinja2 import Environment, StrictUndefined
    from langchain_core.documents import Document
    from markupsafe import Markup, escape

MARKED_SHARE = 0.7
"""A sentence is marked if its score is at least this share of the passage's best score."""
STRONG_SHARE = 0.5
"""Marks are strong in passages of at least this share of the best passage's relevance."""
STAGES = {
    "search": "rewriting",
    "candidates": "first stage",
    "reranked": "reranking",
    "answer": "answer",
}
# Gradio treats HTML as a template, in which these characters begin code.
_CODE_CHARACTERS = str.maketrans({character: f"&#{ord(character)};" for character in "${}`"})


def text(value: object) -> Markup:
    """Return HTML that shows a value as text: not as a tag, an entity or a template."""
    return Markup(escape(value).translate(_CODE_CHARACTERS))  # noqa: S704


def conversation(turns: Sequence[Turn]) -> str:
    """Render all questions and answers, with links from citations to passages."""
    return str(_PAGE.conversation(turns))


def findings(turns: Sequence[Turn]) -> str:
    """Render both orders and the passages of the last turn, and the passages of earlier turns."""
    return str(_PAGE.findings(turns))


def notice(message: str, kind: str = "info") -> str:
    """Render a message of the kind ``info`` or ``error``; an empty message renders as nothing."""
    return str(_PAGE.notice(message, kind))


def cited_parts(turn: Turn) -> Iterator[tuple[str, Sequence[int]]]:
    """Yield the parts of an answer, each with the numbers of the passages cited after it."""
    end = 0
    for citation in citations(turn.answer, len(turn.documents)):
        yield turn.answer[end : citation.start].rstrip(), citation.numbers
        end = citation.stop
    yield turn.answer[end:], ()


def marked_parts(turn: Turn, document: Document) -> Iterator[tuple[str, str]]:
    """Yield the parts of a passage without its heading, each with its style.

    Args:
        turn: The turn, whose candidates hold the text before extraction.
        document: The passage.

    Yields:
        The text of a part, and ``marked`` for the strongest sentences, ``left-out`` for what
        extraction removed, or an empty string.
    """
    ranked = document.metadata.get(METADATA_KEY, {})
    texts = {candidate.id: candidate.page_content for candidate in turn.candidates}
    content = texts.get(document.id, "")
    heading = f"{document.metadata.get('title')}\n\n"
    begin = len(heading) if content.startswith(heading) else 0
    evidence = [part for part in ranked.get("evidence") or [] if part[0] >= begin]
    best = max((score for _, _, score in evidence), default=0.0)
    min_score = MARKED_SHARE * best if best > 0 else best
    marked = [(start, stop) for start, stop, score in evidence if score >= min_score]
    extracted = ranked.get("extracted") or [(begin, len(content))]
    borders = {border for span in [*marked, *extracted] for border in span if border > begin}
    for start, stop in pairwise(sorted({begin, len(content)} | borders)):
        style = "" if _is_within(start, stop, extracted) else "left-out"
        yield content[start:stop], "marked" if _is_within(start, stop, marked) else style


def passage_relevance(document: Document) -> float | None:
    """Return a passage's probability, or its score; ``None`` if it was not ranked."""
    return relevance(document.metadata, document.metadata.get("relevance_score"))


def is_strong(turn: Turn, document: Document) -> bool:
    """Return whether a passage is nearly as relevant as the turn's best one."""
    best = max(passage_relevance(other) or 0.0 for other in turn.documents)
    return (passage_relevance(document) or 0.0) >= STRONG_SHARE * best


def _is_within(start: int, stop: int, spans: Sequence[Sequence[int]]) -> bool:
    return any(begin <= start and stop <= end for begin, end in spans)


def _macros() -> Any:
    environment = Environment(autoescape=True, finalize=text, undefined=StrictUndefined)
    environment.globals |= {
        "NO_ANSWER": NO_ANSWER,
        "STAGES": STAGES,
        "cited_parts": cited_parts,
        "is_strong": is_strong,
        "marked_parts": marked_parts,
        "relevance": passage_relevance,
    }
    lines = Path(__file__).with_name("page.html").read_text(encoding="utf-8").splitlines()
    # White space between tags would show.
    return environment.from_string("".join(map(str.strip, lines))).module


_PAGE = _macros()
