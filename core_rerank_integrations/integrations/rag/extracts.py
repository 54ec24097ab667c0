"""Answers without a model that writes: sentences of the passages, with citations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from core_rerank_integrations.integrations.outputs import METADATA_KEY, relevance

MAX_SENTENCES = 3
PASSAGE_SHARE = 0.75
"""Passages below this share of the best passage's relevance are not quoted."""
SENTENCE_SHARE = 0.5
"""Sentences below this share of their passage's best sentence score are not quoted."""

# A line of at most 120 characters with blank lines around it that does not end like a statement.
_HEADING = re.compile(
    r"(?:\A|\n\s*\n)[^\S\n]*(\S[^\n]{0,118}[^\s.!:…。！।])[^\S\n]*(?=\n\s*\n\s*\S)"  # noqa: RUF001
)


class RankedPassage(NamedTuple):
    """A passage of a reranked list.

    Attributes:
        text: Text of the passage.
        relevance: Probability, or score if the heads are not calibrated; 0 if it was not ranked.
        evidence: Start, stop and score of its sentences, best first; empty if unknown.
    """

    text: str
    relevance: float = 0.0
    evidence: Sequence[Sequence[float]] = ()

    @classmethod
    def from_metadata(
        cls, text: str, score: float | None, metadata: Mapping[str, Any]
    ) -> RankedPassage:
        """Make a passage of a text, the score it was sorted by, and its metadata."""
        evidence = metadata.get(METADATA_KEY, {}).get("evidence", ())
        return cls(text, relevance(metadata, score) or 0.0, evidence)


def extracted_answer(passages: Sequence[RankedPassage]) -> str:
    """Build an answer from the passages' best sentences, each with its citation.

    The first passage gives up to two sentences, in the order of the text. Each of the next ones
    gives one, if it is nearly as relevant. Headings are not quoted, unless a passage has nothing
    else. Without any evidence, the first passage is the answer.

    Args:
        passages: The passages, best first. Citations count them from 1.
    """
    if passages and not any(passage.evidence for passage in passages):
        return _cited(passages[0].text, 1)
    best = max((passage.relevance for passage in passages), default=0.0)
    sentences: list[str] = []
    for number, passage in enumerate(passages, start=1):
        if passage.relevance < PASSAGE_SHARE * best or not passage.evidence:
            continue
        evidence = _without_headings(passage)
        minimum = max(SENTENCE_SHARE * evidence[0][2], 0.0)
        # The best sentence counts whatever its score, which may be negative.
        strong = [evidence[0], *(part for part in evidence[1:] if part[2] >= minimum > 0)]
        limit = min(MAX_SENTENCES - len(sentences), 2 if number == 1 else 1)
        sentences += [
            _cited(passage.text[int(start) : int(stop)], number)
            for start, stop, _ in sorted(strong[:limit], key=lambda sentence: sentence[0])
        ]
    return " ".join(sentences)


def _without_headings(passage: RankedPassage) -> Sequence[Sequence[float]]:
    headings = [match.span(1) for match in _HEADING.finditer(passage.text)]
    return [
        sentence
        for sentence in passage.evidence
        if not any(start <= sentence[0] < stop for start, stop in headings)
    ] or passage.evidence


def _cited(text: str, number: int) -> str:
    return f"{' '.join(text.split())} [{number}]"
