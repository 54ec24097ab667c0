"""Turns as HTML. Whatever comes from documents, visitors or models goes through `text`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from core_rerank_integrations.chat.conversation import Turn
from core_rerank_integrations.integrations.rag.prompts import NO_ANSWER, citations

if TYPE_CHECKING:
    from langchain_core.documents import Document

SHOWN_RANKS = 5
"""Of each order; the rest unfolds."""
MARKED_SHARE = 0.7
"""Sentences of a passage that were given so much of what its strongest was given are marked."""
STRONG_SHARE = 0.5
"""In passages that are so probable, measured by the best, they are marked strongly."""
STAGES = {
    "search": "rewriting",
    "candidates": "first stage",
    "reranked": "reranking",
    "answer": "answer",
}
# The page's components take HTML for a template, in which these begin code.
_TEMPLATE_SIGNS = str.maketrans({sign: f"&#{ord(sign)};" for sign in "${}`"})


def text(content: str) -> str:
    """Any text as HTML that shows just that: no tag, no entity and no template of its own."""
    return escape(content).translate(_TEMPLATE_SIGNS)


def conversation(turns: Sequence[Turn]) -> str:
    """All questions and answers, with links from citations to passages."""
    articles = "".join(_turn(number, turn) for number, turn in enumerate(turns))
    return (
        '<div class="core-talk" role="log" aria-label="Conversation" tabindex="0">'
        f"<div>{articles}</div></div>"
    )


def findings(turns: Sequence[Turn]) -> str:
    """Beside it: both orders and the passages of the last turn, those of earlier ones folded."""
    if not turns:
        return (
            '<div class="core-empty"><h2>What an answer rests on</h2><p>Ask something. Here you '
            "will see what the first stage found, how reranking moved it, and the sentences that "
            "speak for each passage.</p></div>"
        )
    *earlier, last = enumerate(turns)
    folded = "".join(
        f"<details class='core-earlier'><summary>{text(turn.question)}</summary>"
        f"{passages(number, turn)}</details>"
        for number, turn in reversed(earlier)
        if turn.documents
    )
    more = f'<section aria-label="Earlier questions"><h2>Earlier</h2>{folded}</section>'
    number, turn = last
    return f"{orders(turn)}{passages(number, turn)}{more if folded else ''}"


def orders(turn: Turn) -> str:
    """The first stage's order and the reranked one, side by side, with who moved where."""
    if not turn.candidates:
        return ""
    before = {document.id: rank for rank, document in enumerate(turn.candidates, start=1)}
    first = [_place(rank, document) for rank, document in enumerate(turn.candidates, start=1)]
    columns = _column("First stage", "vectors alone", first)
    if turn.reranked:
        ours = [
            _place(rank, document, before[document.id])
            for rank, document in enumerate(turn.reranked, start=1)
        ]
        columns += _column("Reranked", "probability", ours)
    elif turn.reranks and not turn.is_done:
        columns += _column("Reranked", "reading …", [])
    else:
        columns += (
            '<div class="core-column"><h3>Reranked</h3><p class="core-note">Reranking is off: the '
            "answer is drawn from the first stage's order.</p></div>"
        )
    return (
        '<section class="core-orders" aria-label="Both orders"><h2>What was found</h2>'
        f'<div class="core-columns">{columns}</div></section>'
    )


def passages(number: int, turn: Turn) -> str:
    """The passages that the answer is drawn from, their strongest sentences marked."""
    if not turn.documents:
        return ""
    whole = {document.id: document.page_content for document in turn.candidates}
    scores = [document.metadata.get("relevance_score", 0.0) for document in turn.documents]
    best = max(scores)
    cards = "".join(
        f'<li id="{_anchor(number, place)}" class="core-passage" tabindex="-1">'
        f'<header><span class="core-number">{place}</span><span class="core-title">'
        f"{text(_title(document.metadata))}</span>"
        f"{_probability(document.metadata)}</header>"
        f'<p class="core-source">{text(_source(document.metadata))}</p>'
        f'<p class="core-text {"core-strong" if score >= STRONG_SHARE * best else ""}">'
        f"{_marked(whole.get(document.id, ''), document.metadata)}</p></li>"
        for place, (document, score) in enumerate(zip(turn.documents, scores, strict=True), start=1)
    )
    return (
        '<section class="core-passages" aria-label="Evidence"><h2>What the answer rests on</h2>'
        f"<ol>{cards}</ol></section>"
    )


def notice(message: str, kind: str = "info") -> str:
    """A message, ``"info"`` or ``"error"``; an empty one is nothing."""
    if not message:
        return ""
    role = "alert" if kind == "error" else "status"
    return f'<p class="core-notice core-{kind}" role="{role}">{text(message)}</p>'


def _turn(number: int, turn: Turn) -> str:
    searched = (
        f'<p class="core-note">Searched for: {text(turn.search)}</p>'
        if turn.search not in ("", turn.question)
        else ""
    )
    waiting = "" if turn.is_done or turn.answer else '<p class="core-waiting">Reading …</p>'
    return (
        f'<article><h3 class="core-asked"><span class="core-hidden">You asked: </span>'
        f"{text(turn.question)}</h3>{searched}{_answer(number, turn)}{waiting}"
        f"{notice(turn.error, 'error')}{_stages(turn)}</article>"
    )


def _answer(number: int, turn: Turn) -> str:
    """Its text, each citation a link to its passage."""
    if not turn.answer:
        return ""
    pieces, end = [], 0
    for citation in citations(turn.answer, len(turn.documents)):
        pieces.append(text(turn.answer[end : citation.start].rstrip()))
        pieces += [
            f'<a class="core-cite" href="#{_anchor(number, place)}" '
            f'aria-label="Passage {place}">{place}</a>'
            for place in citation.numbers
        ]
        end = citation.stop
    pieces.append(text(turn.answer[end:]))
    kind = "core-answer core-none" if turn.answer.strip() == NO_ANSWER else "core-answer"
    return f'<div class="{kind}">{"".join(pieces)}</div>'


def _stages(turn: Turn) -> str:
    if not turn.is_done or not turn.milliseconds:
        return ""
    spent = " · ".join(
        f"{name} {turn.milliseconds[stage]:,.0f} ms"
        for stage, name in STAGES.items()
        if turn.milliseconds.get(stage, 0) >= 1
    )
    odds = "" if turn.answerable is None else f" · an answer is here: {turn.answerable:.0%}"
    return f'<p class="core-stages">{text(turn.generator)} · {spent}{odds}</p>'


def _column(title: str, note: str, places: Sequence[str]) -> str:
    shown, rest = places[:SHOWN_RANKS], places[SHOWN_RANKS:]
    more = (
        f'<details><summary>{len(rest)} more</summary><ol start="{SHOWN_RANKS + 1}">'
        f"{''.join(rest)}</ol></details>"
    )
    return (
        f'<div class="core-column"><h3>{title} <small>{note}</small></h3>'
        f"<ol>{''.join(shown)}</ol>{more if rest else ''}</div>"
    )


def _place(rank: int, document: Document, before: int | None = None) -> str:
    return (
        f'<li><span class="core-rank">{rank}</span>'
        f'<span class="core-title">{text(_title(document.metadata))}</span>'
        f"{'' if before is None else _moved(before, rank)}{_probability(document.metadata)}</li>"
    )


def _moved(before: int, after: int) -> str:
    if before == after:
        return '<span class="core-moved" title="same place"></span>'
    way, sign = ("up", "▲") if after < before else ("down", "▼")
    count = abs(before - after)
    return (
        f'<span class="core-moved core-{way}" title="was {before}"><span aria-hidden="true">'
        f'{sign}</span>{count}<span class="core-hidden"> places {way}</span></span>'
    )


def _probability(metadata: Mapping[str, Any]) -> str:
    given = metadata.get("relevance_score")
    return "" if given is None else f'<span class="core-probability">{given:.2f}</span>'


def _title(metadata: Mapping[str, Any]) -> str:
    page = metadata.get("page")
    return metadata.get("title") or f"{metadata['source']}{f', page {page}' if page else ''}"


def _source(metadata: Mapping[str, Any]) -> str:
    page = metadata.get("page")
    return f"{metadata['source']}{f', page {page}' if page else ''}"


def _marked(content: str, metadata: Mapping[str, Any]) -> str:
    """A passage without its heading, its strongest sentences marked, what was left out pale."""
    heading = f"{metadata.get('title')}\n\n"
    begin = len(heading) if content.startswith(heading) else 0
    evidence = [part for part in metadata.get("evidence") or [] if part[0] >= begin]
    least = MARKED_SHARE * max((score for _, _, score in evidence), default=0.0)
    marked = [(start, stop) for start, stop, score in evidence if score >= least > 0]
    kept = metadata.get("extracted") or [(begin, len(content))]
    places = [place for span in [*marked, *kept] for place in span if place > begin]
    pieces = []
    for start, stop in pairwise(sorted({begin, len(content), *places})):
        shown = text(content[start:stop])
        if _within(start, stop, marked):
            shown = f"<mark>{shown}</mark>"
        elif not _within(start, stop, kept):
            shown = f'<span class="core-left-out">{shown}</span>'
        pieces.append(shown)
    return "".join(pieces)


def _within(start: int, stop: int, spans: Sequence[Sequence[int]]) -> bool:
    return any(begin <= start and stop <= end for begin, end in spans)


def _anchor(turn: int, place: int) -> str:
    return f"core-{turn}-{place}"
