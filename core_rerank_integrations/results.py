"""Results of a rerank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import overload

from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.method.evidence import Evidence
from core_rerank_integrations.method.extraction import Extract, ExtractBy, extract


@dataclass(frozen=True, slots=True)
class RerankResult:
    """One document after reranking.

    Attributes:
        index: Index of the document in the list that was passed in.
        score: Score by which the list is sorted; higher is more relevant. Calibrated attention
            mass, plus what the first stage adds. Comparable within one list; it has no fixed
            range and may be negative.
        document: Text of the document, as passed in.
        probability: Probability that the document is relevant, from query and document alone:
            the same in any list. ``None`` if the heads are not calibrated.
        best_passage: Start and stop of the characters that the score comes from, if the document
            was read as several passages; ``None`` if it was read whole.
        reranked: ``False`` if the document was not read within ``max_seconds``. It then comes
            after all others, in input order, with a score of minus infinity.
        evidence: Sentences of the document, best first, if requested.
    """

    index: int
    score: float
    document: str
    probability: float | None = None
    best_passage: tuple[int, int] | None = None
    reranked: bool = True
    evidence: tuple[Evidence, ...] = ()

    @property
    def relevance_score(self) -> float:
        """The probability if there is one, else the score."""
        return self.score if self.probability is None else self.probability

    def extract(self, share: float, by: ExtractBy = "tokens") -> Extract:
        """Cut the document to its best sentences; see `method.extraction.extract`.

        Raises:
            InvalidInputError: ``share`` is not above 0 and at most 1, ``by`` is unknown, or the
                results have no evidence.
        """
        if not self.evidence and self.document.strip():
            raise InvalidInputError(
                f"document {self.index} has no scored sentences: rerank with evidence=True"
            )
        return extract(self.document, self.evidence, share, by)

    def _repr_html_(self) -> str:
        """Return the document with its words shaded by their scores, for notebooks."""
        words = sorted(word for part in self.evidence for word in part.words)
        strongest = max((word.score for word in words), default=0.0)
        pieces, end = [], 0
        for word in words:
            if word.score <= 0:
                continue
            shade = f"background: rgba(255, 200, 0, {word.score / strongest:.2f})"
            text = escape(self.document[word.start : word.stop])
            pieces.append(escape(self.document[end : word.start]))
            pieces.append(f'<span style="{shade}">{text}</span>')
            end = word.stop
        pieces.append(escape(self.document[end:]))
        return f"<p><b>{self.relevance_score:.3f}</b> {''.join(pieces)}</p>"


@dataclass(frozen=True, slots=True, repr=False)
class RerankResults(Sequence[RerankResult]):
    """The results of one list, best first.

    Attributes:
        results: The results that are returned.
        answerability: Probability that the list holds a relevant document, from the
            probabilities of all its documents that were read, also of those that are not
            returned. ``None`` if none of them was read in time, or the head set has no model of
            it; see `Abstention`.
        answerable: Whether the answerability reaches the threshold of the head set, which
            ``score_threshold="auto"`` stands for.
    """

    results: tuple[RerankResult, ...]
    answerability: float | None = None
    answerable: bool | None = None

    def __len__(self) -> int:
        return len(self.results)

    @overload
    def __getitem__(self, index: int) -> RerankResult: ...
    @overload
    def __getitem__(self, index: slice) -> list[RerankResult]: ...
    def __getitem__(self, index: int | slice) -> RerankResult | list[RerankResult]:
        return list(self.results[index]) if isinstance(index, slice) else self.results[index]

    def __repr__(self) -> str:
        return repr(list(self.results))

    def _repr_html_(self) -> str:
        """Return the results as HTML, for notebooks."""
        return "".join(result._repr_html_() for result in self.results)
