"""An answer without a generator: the passages' own sentences, with citations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

MOST_SENTENCES = 3
PASSAGE_SHARE = 0.75
"""Of the best passage's relevance; passages that have less of it do not speak."""
SENTENCE_SHARE = 0.5
"""Of what the strongest sentence was given; the best passage's others speak from there on."""


class RankedPassage(NamedTuple):
    """A passage of a reranked list.

    Attributes:
        text: Its text.
        relevance: Its probability, or score; 0 where it was not ranked.
        evidence: Start, stop and score of its sentences, the strongest first; empty where they
            are not known.
    """

    text: str
    relevance: float = 0.0
    evidence: Sequence[Sequence[float]] = ()


def extracted_answer(passages: Sequence[RankedPassage]) -> str:
    """The sentences that answer, each with its citation, in the order they are to be read in.

    From the first passage its strongest sentence and those that come near it, in the order of
    the text; from the next ones, where they are nearly as good, their strongest.
    Where nothing is known of sentences, the first passage as it is.

    Args:
        passages: The best first; their places, from 1, are what is cited.
    """
    if passages and not any(passage.evidence for passage in passages):
        return _cited(passages[0].text, 1)
    best = max((passage.relevance_score for passage in passages), default=0.0)
    found: list[str] = []
    for number, passage in enumerate(passages, start=1):
        if passage.relevance_score < PASSAGE_SHARE * best or not passage.evidence:
            continue
        strongest = passage.evidence[0][2]
        room = MOST_SENTENCES - len(found)
        near = [part for part in passage.evidence if part[2] >= SENTENCE_SHARE * strongest]
        chosen = near[: min(room, 2 if number == 1 else 1)]
        found += [
            _cited(passage.text[int(start) : int(stop)], number)
            for start, stop, _ in sorted(chosen, key=lambda part: part[0])
        ]
    return " ".join(found)


def _cited(text: str, number: int) -> str:
    return f"{' '.join(text.split())} [{number}]"
