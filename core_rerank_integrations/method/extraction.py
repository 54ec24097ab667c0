"""Extraction: documents cut to their best sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.method.evidence import Evidence, Word

ExtractBy = Literal["tokens", "score"]
"""Whether the share to keep is a share of the document's tokens or of its sentences' scores."""

GAP = " … "
"""Replaces the text that is left out between two sentences."""


class Extract(NamedTuple):
    """The part of a document that is kept.

    Attributes:
        text: The best sentences in their order, with `GAP` where sentences are left out.
        spans: Start and stop of the parts that are kept, in characters of the document.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


def extract(
    document: str, evidence: Sequence[Evidence], share: float, by: ExtractBy = "tokens"
) -> Extract:
    """Cut a document to its best sentences.

    The best sentence is always kept, and no sentence is divided. Sentences that were not read are
    left out.

    Args:
        document: Text of the document.
        evidence: Its sentences, best first.
        share: With ``"tokens"``, the maximum share of the document's tokens to keep: sentences
            are added as they fit, best first. With ``"score"``, the share of the softmax of all
            sentence scores to keep.
        by: Whether ``share`` counts tokens or scores.

    Raises:
        InvalidInputError: ``share`` is not above 0 and at most 1, or ``by`` is unknown.
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
    for index in sorted(range(len(evidence)), key=lambda index: evidence[index].start):
        sentence = evidence[index]
        if index in chosen:
            start = spans.pop()[0] if follows else sentence.start
            spans.append((start, sentence.stop))
        follows = index in chosen
    return Extract(GAP.join(document[start:stop] for start, stop in spans), tuple(spans))


def evidence_within(evidence: Sequence[Evidence], start: int, stop: int) -> list[Evidence]:
    """Return the evidence inside ``document[start:stop]``, best first.

    Offsets are relative to ``start``; words are left out. A sentence that is partly inside gets the
    share of its score that its words inside have of the positive scores of all its words.
    """
    found = []
    for sentence in evidence:
        if sentence.start >= stop or sentence.stop <= start:
            continue
        inside = [word for word in sentence.words if start <= word.start and word.stop <= stop]
        score, tokens = sentence.score, sentence.tokens
        if len(inside) < len(sentence.words):
            score *= _positive(inside) / (_positive(sentence.words) or 1.0)
            tokens = round(tokens * len(inside) / len(sentence.words))
        first, last = max(sentence.start, start), min(sentence.stop, stop)
        found.append(Evidence(first - start, last - start, score, tokens=tokens))
    return sorted(found, key=lambda sentence: -sentence.score)


def check_share(name: str, share: Any) -> None:
    """Raise unless ``0 < share <= 1``.

    Raises:
        InvalidInputError: ``share`` is not a number above 0 and at most 1.
    """
    is_number = isinstance(share, int | float) and not isinstance(share, bool)
    if not (is_number and 0 < share <= 1):
        raise InvalidInputError(f"{name} must be above 0 and at most 1, got {share!r}")


def _positive(words: Sequence[Word]) -> float:
    return sum(max(word.score, 0.0) for word in words)


def _within_tokens(evidence: Sequence[Evidence], share: float) -> Iterator[int]:
    left = share * sum(sentence.tokens for sentence in evidence)
    for index, sentence in enumerate(evidence):
        if not index or sentence.tokens <= left:
            yield index
            left -= sentence.tokens


def _by_score(evidence: Sequence[Evidence], share: float) -> Iterator[int]:
    scores = np.array([sentence.score for sentence in evidence])
    shares = np.exp(scores - scores.max(initial=-np.inf))
    before = np.cumsum(shares) - shares
    # Adding the smallest shares to the sum may not change it, so a share of 1 keeps all.
    wanted = share * shares.sum() if share < 1 else np.inf
    return (index for index in range(len(evidence)) if before[index] < wanted)
