"""What a rerank returns."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.evidence import Evidence
from core_rerank_integrations.extraction import Extract, ExtractBy, extract


@dataclass(frozen=True, slots=True)
class RerankResult:
    """One candidate after reranking.

    Attributes:
        index: Position of the candidate in the list that was passed in.
        score: What the list is sorted by; higher is more relevant. Calibrated attention mass,
            and what a first stage's order adds where it counts. Comparable within one list; it
            has no fixed range and may be negative.
        document: The candidate's text, as passed in.
        probability: That the candidate is relevant, from question and candidate alone: the same
            in any list. ``None`` where the heads were not calibrated.
        passage: Start and stop of the characters that the score comes from, where the candidate
            is longer than what the heads read at once; ``None`` where all of it was read.
        reranked: ``False`` where ``max_seconds`` were over before the candidate was read. It then
            stands behind all that were, in the order it came in; its score is minus infinity.
        evidence: The candidate's sentences, those that speak most for it first, where they were
            asked for.
    """

    index: int
    score: float
    document: str
    probability: float | None = None
    passage: tuple[int, int] | None = None
    reranked: bool = True
    evidence: tuple[Evidence, ...] = ()

    def extract(self, share: float, by: ExtractBy = "tokens") -> Extract:
        """The document, cut to the sentences that speak most for it; see `extraction.extract`.

        Raises:
            InvalidInputError: ``share`` is not above 0 and at most 1, there is no such ``by``, or
                evidence was not asked for.
        """
        if not self.evidence and self.document.strip():
            raise InvalidInputError(
                f"nothing is known of the sentences of document {self.index}: rerank with "
                "evidence=True"
            )
        return extract(self.document, self.evidence, share, by)

    def _repr_html_(self) -> str:
        """For notebooks: the document, its words shaded by how much they speak for it."""
        words = sorted(word for part in self.evidence for word in part.words)
        strongest = max((word.score for word in words), default=0.0)
        pieces, place = [], 0
        for word in words:
            if word.score <= 0:
                continue
            shade = f"background: rgba(255, 200, 0, {word.score / strongest:.2f})"
            pieces.append(escape(self.document[place : word.start]))
            text = escape(self.document[word.start : word.stop])
            pieces.append(f'<span style="{shade}">{text}</span>')
            place = word.stop
        pieces.append(escape(self.document[place:]))
        return f"<p><b>{self.relevance:.3f}</b> {''.join(pieces)}</p>"

    @property
    def relevance(self) -> float:
        """The probability where there is one, else the score."""
        return self.score if self.probability is None else self.probability
