"""Documents cut to their strongest sentences."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, strategies as st
from langchain_core.documents import Document
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from tokenizers import Tokenizer

from core_rerank_integrations import CoReDocumentCompressor, CoReNodePostprocessor, CoReReranker
from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.method.evidence import Evidence, Word
from core_rerank_integrations.method.extraction import GAP, evidence_within, extract
from core_rerank_integrations.models.local_model import LocalModel
from core_rerank_integrations.results import RerankResult

QUERY = "Who patented the telephone?"
DOCUMENT = (
    "  Bread is baked. The telephone was patented by Bell in 1876! 😀 Gulls fly. Fish swim.\n"
)
SENTENCES = (
    Evidence(18, 61, 3.0, tokens=12),
    Evidence(62, 74, 2.0, tokens=6),
    Evidence(2, 17, 1.0, tokens=4),
    Evidence(75, 85, 0.0, tokens=3),
)
"""The sentences of `DOCUMENT`, best first."""


def texts(spans: tuple[tuple[int, int], ...]) -> list[str]:
    return [DOCUMENT[start:stop] for start, stop in spans]


def test_neighbours_stay_together_and_gaps_are_marked() -> None:
    kept = extract(DOCUMENT, SENTENCES, 18 / 25)
    assert kept.text == "The telephone was patented by Bell in 1876! 😀 Gulls fly."
    assert kept.spans == ((18, 74),)
    kept = extract(DOCUMENT, [SENTENCES[index] for index in (0, 3, 1, 2)], 15 / 25)
    assert kept.text == f"The telephone was patented by Bell in 1876!{GAP}Fish swim."
    assert kept.spans == ((18, 61), (75, 85))


def test_a_sentence_that_does_not_fit_makes_room_for_one_that_does() -> None:
    kept = extract(DOCUMENT, SENTENCES, 16 / 25)
    assert texts(kept.spans) == ["Bread is baked. The telephone was patented by Bell in 1876!"]


def test_the_strongest_sentence_is_kept_whatever_its_length() -> None:
    assert texts(extract(DOCUMENT, SENTENCES, 0.01).spans) == [
        "The telephone was patented by Bell in 1876!"
    ]


def test_by_score_as_many_as_hold_the_share() -> None:
    odds = [math.exp(sentence.score) for sentence in SENTENCES]
    first, second = (sum(odds[:count]) / sum(odds) for count in (1, 2))
    assert len(extract(DOCUMENT, SENTENCES, first - 0.01, "score").spans) == 1
    assert extract(DOCUMENT, SENTENCES, first + 0.01, "score").spans == ((18, 74),)
    assert extract(DOCUMENT, SENTENCES, second - 0.01, "score").spans == ((18, 74),)
    assert extract(DOCUMENT, SENTENCES, second + 0.01, "score").spans == ((2, 74),)
    far = [sentence._replace(score=900 * sentence.score) for sentence in SENTENCES]
    assert extract(DOCUMENT, far, 1.0, "score").spans == ((2, 85),)


@given(
    scores=st.lists(st.floats(-5, 5), max_size=8),
    share=st.floats(0, 1, exclude_min=True),
    by=st.sampled_from(["tokens", "score"]),
)
def test_what_is_kept_is_of_the_document_and_in_its_order(
    scores: list[float], share: float, by: str
) -> None:
    document = " ".join("Yes." for _ in scores)
    spans = [(5 * index, 5 * index + 4) for index in range(len(scores))]
    evidence = sorted(
        (Evidence(*span, score, tokens=2) for span, score in zip(spans, scores, strict=True)),
        key=lambda sentence: -sentence.score,
    )
    kept = extract(document, evidence, share, by)  # type: ignore[arg-type]
    assert kept.text == GAP.join(document[start:stop] for start, stop in kept.spans)
    borders = [border for span in kept.spans for border in span]
    assert borders == sorted(set(borders))
    assert bool(kept.spans) == bool(scores)
    if by == "tokens" and scores:
        assert sum((stop - start + 1) // 5 for start, stop in kept.spans) <= max(
            1, share * len(scores)
        )


@pytest.mark.parametrize("share", [0, -0.5, 1.1, math.nan, True, "half", None])
def test_other_shares_are_refused(share: object) -> None:
    with pytest.raises(InvalidInputError, match=r"share must be above 0 and at most 1, got"):
        extract(DOCUMENT, SENTENCES, share)  # type: ignore[arg-type]


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="'tokens' or by 'score', got 'words'"):
        extract(DOCUMENT, SENTENCES, 0.5, "words")  # type: ignore[arg-type]


def test_evidence_within_a_part() -> None:
    within = evidence_within(SENTENCES, 10, 62)
    assert [(sentence.start, sentence.stop) for sentence in within] == [(8, 51), (0, 7)]


def test_a_sentence_that_is_partly_inside_has_the_score_of_its_words() -> None:
    words = (Word(0, 4, 3.0), Word(5, 9, -1.0), Word(10, 14, 1.0), Word(15, 19, 0.0))
    evidence = (Evidence(0, 20, 8.0, words, tokens=8), Evidence(21, 30, 2.5, tokens=2))
    assert evidence_within(evidence, 10, 30) == [
        Evidence(11, 20, 2.5, tokens=2),
        Evidence(0, 10, 2.0, tokens=4),
    ]
    assert evidence_within(evidence, 15, 30)[1].score == 0
    assert evidence_within(evidence, 0, 12)[0].score == 6


def test_tokens_are_counted_once(calibrated: CoReReranker, smollm2: LocalModel) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2.path / "tokenizer.json"))
    long = " ".join(f"{DOCUMENT.strip()} Number {number}." for number in range(12))
    for text in (DOCUMENT, long):
        (result,) = calibrated.rerank(QUERY, [text], evidence=True)
        counted = sum(part.tokens for part in result.evidence)
        assert counted == pytest.approx(len(tokenizer.encode(text)), rel=0.05, abs=3)


def test_results_want_evidence_to_be_cut(calibrated: CoReReranker) -> None:
    (result,) = calibrated.rerank(QUERY, [DOCUMENT], evidence=True)
    kept = result.extract(0.6)
    assert 0 < len(kept.text) < len(DOCUMENT)
    assert kept == extract(DOCUMENT, result.evidence, 0.6)
    (plain,) = calibrated.rerank(QUERY, [DOCUMENT])
    with pytest.raises(InvalidInputError, match="rerank with evidence=True"):
        plain.extract(0.5)
    assert RerankResult(0, 0.0, " \n").extract(0.5) == ("", ())


def test_langchain_documents_are_cut(calibrated: CoReReranker) -> None:
    compressor = CoReDocumentCompressor(reranker=calibrated, extract=0.6)
    original = Document(DOCUMENT, id="a", metadata={"page": 3})
    (cut,) = compressor.compress_documents([original], QUERY)
    assert original == Document(DOCUMENT, id="a", metadata={"page": 3})
    assert (cut.id, cut.metadata["page"]) == ("a", 3)
    ours = cut.metadata["core_rerank"]
    assert "evidence" not in ours
    spans = ours["extracted"]
    assert cut.page_content == GAP.join(DOCUMENT[start:stop] for start, stop in spans)
    assert_whole_sentences(spans)
    assert len(cut.page_content) < len(DOCUMENT)
    by_score = CoReDocumentCompressor(reranker=calibrated, extract=1, extract_by="score")
    assert by_score.compress_documents([original], QUERY)[0].page_content == DOCUMENT.strip()


def assert_whole_sentences(spans: list[list[int]]) -> None:
    assert {start for start, _ in spans} <= {sentence.start for sentence in SENTENCES}
    assert {stop for _, stop in spans} <= {sentence.stop for sentence in SENTENCES}


def test_nodes_are_cut_but_not_their_metadata(calibrated: CoReReranker) -> None:
    postprocessor = CoReNodePostprocessor(reranker=calibrated, extract=0.6)
    node = TextNode(text=DOCUMENT, id_="a", metadata={"title": "Who patented the telephone. A"})
    (cut,) = postprocessor.postprocess_nodes([NodeWithScore(node=node)], query_str=QUERY)
    assert node.text == DOCUMENT
    assert (cut.node.node_id, cut.node.metadata["title"]) == ("a", node.metadata["title"])
    spans = cut.node.metadata["core_rerank"]["extracted"]
    assert cut.text == GAP.join(DOCUMENT[start:stop] for start, stop in spans)
    assert_whole_sentences(spans)
    assert 0 < len(cut.text) < len(DOCUMENT)
    assert "extracted" not in cut.node.get_content(metadata_mode=MetadataMode.LLM)
    bare = TextNode(text=DOCUMENT)
    (cut,) = postprocessor.postprocess_nodes([NodeWithScore(node=bare)], query_str=QUERY)
    spans = cut.node.metadata["core_rerank"]["extracted"]
    assert cut.text == GAP.join(DOCUMENT[start:stop] for start, stop in spans)
    assert_whole_sentences(spans)


def test_a_node_that_hides_its_text_is_refused(calibrated: CoReReranker) -> None:
    node = TextNode(text=DOCUMENT, metadata={"a": 1}, text_template="{metadata_str}")
    postprocessor = CoReNodePostprocessor(reranker=calibrated, extract=0.6)
    with pytest.raises(InvalidInputError, match="its text_template changes its text"):
        postprocessor.postprocess_nodes([NodeWithScore(node=node)], query_str=QUERY)


def test_what_was_not_read_in_time_is_not_cut(calibrated: CoReReranker) -> None:
    compressor = CoReDocumentCompressor(reranker=calibrated, extract=0.3, max_seconds=1e-9)
    first, second = compressor.compress_documents([Document(DOCUMENT), Document(DOCUMENT)], QUERY)
    assert len(first.page_content) < len(DOCUMENT)
    assert second.page_content == DOCUMENT
    assert second.metadata["core_rerank"] == {"probability": None, "reranked": False}
