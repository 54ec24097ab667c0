from __future__ import annotations

from core_rerank_integrations.integrations.rag.extracts import (
    MAX_SENTENCES,
    RankedPassage,
    extracted_answer,
)

ONE = "Bread is baked. Bell patented it. It was in 1876."
BREAD, BELL, WHEN = [0, 15, 0.1], [16, 33, 0.9], [34, 49, 0.6]


def test_sentences_come_in_the_order_of_the_text_with_their_citations() -> None:
    passages = [RankedPassage(ONE, 0.5, [BELL, WHEN, BREAD]), RankedPassage(ONE, 0.1, [BREAD])]
    assert extracted_answer(passages) == "Bell patented it. [1] It was in 1876. [1]"


def test_passages_that_are_nearly_as_relevant_add_their_best_sentence() -> None:
    passages = [RankedPassage(ONE, 0.5, [BELL]), RankedPassage(ONE, 0.45, [WHEN, BELL])]
    assert extracted_answer(passages) == "Bell patented it. [1] It was in 1876. [2]"
    many = extracted_answer([RankedPassage(ONE, 0.5, [BELL, WHEN])] * 9)
    assert many.count("[") == MAX_SENTENCES


def test_without_evidence_the_first_passage_answers() -> None:
    assert extracted_answer([RankedPassage("Some\ntext."), RankedPassage("x")]) == "Some text. [1]"
    assert extracted_answer([]) == ""
