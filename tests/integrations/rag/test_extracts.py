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


def test_the_best_sentence_is_quoted_whatever_its_score() -> None:
    negative = [[start, stop, score - 2] for start, stop, score in (BELL, WHEN, BREAD)]
    assert extracted_answer([RankedPassage(ONE, 0.5, negative)]) == "Bell patented it. [1]"


def test_without_evidence_the_first_passage_answers() -> None:
    assert extracted_answer([RankedPassage("Some\ntext."), RankedPassage("x")]) == "Some text. [1]"
    assert extracted_answer([]) == ""


def test_headings_are_not_quoted() -> None:
    text = "Are dogs allowed?\n\nOn deck\n\nDogs may come on a lead. Cats may not."
    dogs, deck = [0, 17, 0.9], [19, 26, 0.8]
    lead, cats = [28, 52, 0.5], [53, 66, 0.1]
    answer = extracted_answer([RankedPassage(text, 0.5, [dogs, deck, lead, cats])])
    assert answer == "Dogs may come on a lead. [1]"
    only_heading = RankedPassage(text, 0.5, [deck])
    assert extracted_answer([only_heading]) == "On deck [1]"
    statement = "Bring a towel.\n\nThe pool is cold."
    assert extracted_answer([RankedPassage(statement, 0.5, [[0, 14, 0.9]])]) == "Bring a towel. [1]"
