"""Documents cut to the sentences that matter: whole ones, in their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.evidence import Evidence

ExtractBy = Literal["tokens", "score"]
"""What a share is one of: a document's tokens, or what its sentences were given."""

GAP = " … "
"""Stands for what was left out between two sentences."""


class Extract(NamedTuple):
    """What is kept of a document.

    Attributes:
        text: Its strongest sentences, in their order, `GAP` where some between them are missing.
        spans: Start and stop of what was kept, in characters of the document.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


def extract(
    document: str, evidence: Sequence[Evidence], share: float, by: ExtractBy = "tokens"
) -> Extract:
    """The document's strongest sentences.

    The strongest one is always kept, and no sentence is cut. Those that were not read are left
    out.

    Args:
        document: Its text.
        evidence: Its sentences, the strongest first.
        share: By ``"tokens"``, how much of the document's tokens is kept at most: sentences are
            taken as they fit, the strongest first. By ``"score"``, how probable it should be
            that the sentence asked for is among the kept ones, by the softmax of all scores.
        by: What ``share`` is a share of.

    Raises:
        InvalidInputError: ``share`` is not above 0 and at most 1, or there is no such ``by``.
    """
    check_share("share", share)
    if by == "tokens":
        kept = _within_tokens(evidence, share)
    elif by == "score":
        kept = _by_score(evidence, share)
    else:
        raise InvalidInputError(f"documents are cut by 'tokens' or by 'score', got {by!r}")
    chosen = set(kept)
    spans: list[tuple[int, int]] = []
    follows = False
    for place in sorted(range(len(evidence)), key=lambda place: evidence[place].start):
        sentence = evidence[place]
        if place in chosen:
            start = spans.pop()[0] if follows else sentence.start
            spans.append((start, sentence.stop))
        follows = place in chosen
    return Extract(GAP.join(document[start:stop] for start, stop in spans), tuple(spans))


def evidence_within(evidence: Sequence[Evidence], start: int, stop: int) -> list[Evidence]:
    """Of a part of a document, in characters of that part; its words are left out."""
    return [
        sentence._replace(
            start=max(sentence.start, start) - start,
            stop=min(sentence.stop, stop) - start,
            words=(),
        )
        for sentence in evidence
        if sentence.start < stop and sentence.stop > start
    ]


def check_share(name: str, share: Any) -> None:
    """Refuse what is no share of a document.

    Raises:
        InvalidInputError: It is no number above 0 and at most 1.
    """
    is_number = isinstance(share, int | float) and not isinstance(share, bool)
    if not (is_number and 0 < share <= 1):
        raise InvalidInputError(f"{name} must be above 0 and at most 1, got {share!r}")


def _within_tokens(evidence: Sequence[Evidence], share: float) -> Iterator[int]:
    left = share * sum(sentence.tokens for sentence in evidence)
    for place, sentence in enumerate(evidence):
        if not place or sentence.tokens <= left:
            yield place
            left -= sentence.tokens


def _by_score(evidence: Sequence[Evidence], share: float) -> Iterator[int]:
    scores = np.array([sentence.score for sentence in evidence])
    shares = np.exp(scores - scores.max(initial=-np.inf))
    before = np.cumsum(shares) - shares
    # The last shares may be too small for a sum to show.
    wanted = share * shares.sum() if share < 1 else np.inf
    return (place for place in range(len(evidence)) if before[place] < wanted)
