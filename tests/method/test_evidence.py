"""Sentences and words of a document, and their scores."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from langchain_core.documents import Document
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from support.head_sets import CALIBRATED

from core_rerank_integrations import (
    CoReDocumentCompressor,
    CoReNodePostprocessor,
    CoReReranker,
    Head,
    HeadSet,
)
from core_rerank_integrations.method.evidence import (
    TokenScores,
    character_scores,
    evidence_in,
    sentences,
    sums,
)
from core_rerank_integrations.results import RerankResult

QUERY = "Who patented the telephone?"
DOCUMENT = "Bread is baked. The telephone was patented by Bell in 1876! 😀 Gulls fly."
DOCUMENTS = [DOCUMENT, "Bread is baked from flour.", ""]


def scored(text: str, starts: list[int], scores: list[float], begin: int = 0) -> TokenScores:
    return TokenScores(begin, text, np.array(starts), np.array(scores))


def test_tokens_are_spread_over_their_characters() -> None:
    passage = scored("ab cd", [0, 2, 5], [4.0, 6.0, 9.0])
    characters = character_scores("ab cd", [passage])
    assert characters == pytest.approx([2, 2, 2, 2, 2]), "the last stands behind the text"
    assert sums(characters, [(0, 2), (2, 5), (3, 3)]) == pytest.approx([4, 6, 0])
    several = scored("é", [0, 0, 1], [1.0, 2.0, 5.0])
    assert character_scores("é", [several]) == pytest.approx([3]), "tokens of one character"


def test_passages_that_overlap_count_by_their_mean() -> None:
    passages = [scored("abc", [0, 3], [3.0, 0.0]), scored("cd", [0, 2], [6.0, 0.0], begin=2)]
    assert character_scores("abcde", passages) == pytest.approx([1, 1, 2, 3, 0])


def test_heads_are_summed_each_by_itself() -> None:
    passage = TokenScores(0, "ab", np.array([0, 1, 2]), np.array([[1.0, 2, 9], [3.0, 4, 9]]))
    characters = character_scores("ab", [passage])
    assert characters.tolist() == [[1, 2], [3, 4]]
    assert sums(characters, [(0, 2)]).tolist() == [[3], [7]]


def test_what_stands_behind_a_sentence_speaks_for_it() -> None:
    text = "One. Two."
    passage = scored(text, [0, 3, 4, 8, 9], [0.0, 1.0, 5.0, 2.0, 4.0])
    first, second = evidence_in(text, [passage])
    assert (text[first.start : first.stop], first.score) == ("One.", 6.0)
    assert text[second.start : second.stop] == "Two."
    assert second.score == pytest.approx(5.5), "three of the four characters of ' Two', and the end"
    assert [text[word.start : word.stop] for word in second.words] == ["Two"]


def test_sentences_of_several_languages() -> None:
    text = "Dr. Smith came in March. 他们去了北京。他们回来了。 ¿Qué pasa?\n\n  Fin."
    found = [text[start:stop] for start, stop in sentences(text)]
    assert found == [
        "Dr. Smith came in March.", "他们去了北京。", "他们回来了。", "¿Qué pasa?", "Fin.",
    ]  # fmt: skip


@given(documents=st.lists(st.text(), min_size=1, max_size=4))
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_spans_lie_inside_any_text_and_never_overlap(
    documents: list[str], calibrated: CoReReranker
) -> None:
    for result in calibrated.rerank(QUERY, documents, evidence=True):
        places = sorted((part.start, part.stop) for part in result.evidence)
        borders = [border for place in places for border in place]
        assert borders == sorted(borders)
        assert all(start < stop for start, stop in places)
        assert not borders or (borders[0] >= 0 and borders[-1] <= len(result.document))
        for part in result.evidence:
            words = [border for word in part.words for border in word[:2]]
            assert words == sorted(words)
            assert not words or (part.start <= words[0] and words[-1] <= part.stop)
            assert np.isfinite(part.score)


def test_evidence_changes_nothing_else(calibrated: CoReReranker) -> None:
    plain = calibrated.rerank(QUERY, DOCUMENTS)
    told = calibrated.rerank(QUERY, DOCUMENTS, evidence=True)
    assert [result.index for result in told] == [result.index for result in plain]
    assert [result.score for result in told] == pytest.approx(
        [result.score for result in plain], abs=1e-6
    )
    assert all(result.evidence == () for result in plain)
    assert [len(result.evidence) for result in told if result.index == 0] == [3]
    again = asyncio.run(calibrated.arerank(QUERY, DOCUMENTS, evidence=True))
    assert [len(result.evidence) for result in again] == [len(r.evidence) for r in told]


def test_a_long_document_has_evidence_all_through(calibrated: CoReReranker) -> None:
    long = " ".join(f"{DOCUMENT} Number {number}." for number in range(12))
    (result,) = calibrated.rerank(QUERY, [long], evidence=True)
    assert result.best_passage is not None
    places = [(part.start, part.stop) for part in result.evidence]
    assert sorted(places) == sentences(long)


def test_weights_of_its_own(calibrated: CoReReranker) -> None:
    heads = CALIBRATED.heads
    told = HeadSet.model_validate(
        {
            **CALIBRATED.model_dump(),
            "heads": [
                head.model_copy(update={"evidence_weight": -1.0 if index else 0.0})
                for index, head in enumerate(heads)
            ],
        }
    )
    assert told.evidence_weights.tolist() == [0.0] + [-1.0] * (len(heads) - 1)
    assert CALIBRATED.evidence_weights.tolist() == CALIBRATED.weights.tolist()
    own = CoReReranker.from_scorer(calibrated.scorer, calibrated.model, told)
    plain = calibrated.rerank(QUERY, [DOCUMENT], evidence=True)[0]
    other = own.rerank(QUERY, [DOCUMENT], evidence=True)[0]
    assert other.score == pytest.approx(plain.score, abs=1e-6)
    assert [part.score for part in other.evidence] != [part.score for part in plain.evidence]
    calibrated.clear_cache()
    afresh = own.rerank(QUERY, [DOCUMENT], evidence=True)[0]
    assert [part.score for part in afresh.evidence] == pytest.approx(
        [part.score for part in other.evidence], abs=1e-6
    )
    assert Head(layer=0, head=0).evidence_weight is None


def test_no_evidence_of_what_was_not_read(calibrated: CoReReranker) -> None:
    first, *rest = calibrated.rerank(QUERY, DOCUMENTS, max_seconds=1e-9, evidence=True)
    assert first.evidence
    assert all(result.evidence == () for result in rest)


def test_adapters_put_it_into_the_metadata(calibrated: CoReReranker) -> None:
    compressor = CoReDocumentCompressor(reranker=calibrated, evidence=True, top_n=1)
    (document,) = compressor.compress_documents([Document(DOCUMENT)], QUERY)
    start, stop, _ = document.metadata["core_rerank"]["evidence"][0]
    assert DOCUMENT[start:stop] in [DOCUMENT[a:b] for a, b in sentences(DOCUMENT)]
    postprocessor = CoReNodePostprocessor(reranker=calibrated, evidence=True)
    (node,) = postprocessor.postprocess_nodes(
        [NodeWithScore(node=TextNode(text=DOCUMENT))], query_str=QUERY
    )
    assert len(node.node.metadata["core_rerank"]["evidence"]) == 3
    assert "evidence" not in node.node.get_content(metadata_mode=MetadataMode.LLM)
    assert "evidence" not in node.node.get_content(metadata_mode=MetadataMode.EMBED)


def test_notebooks_never_render_what_a_document_holds(calibrated: CoReReranker) -> None:
    hostile = "<script>alert(1)</script> Bell patented the telephone."
    (result,) = calibrated.rerank(QUERY, [hostile], evidence=True)
    shown = result._repr_html_()
    assert "<script>" not in shown
    assert "&lt;" in shown
    assert RerankResult(0, 0.5, "a & b")._repr_html_() == "<p><b>0.500</b> a &amp; b</p>"
