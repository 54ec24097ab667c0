from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.heads.head_set import Head
from core_rerank_integrations.method.windows import Candidates
from core_rerank_integrations.models.local_model import LocalModel
from core_rerank_integrations.research.collection import Collection, Passage
from core_rerank_integrations.research.detection import (
    Case,
    HeadScores,
    detection_cases,
    score_heads,
)
from core_rerank_integrations.research.features import HeadFeatures, HeadReader
from core_rerank_integrations.research.options import FindOptions

COLLECTION = Collection(
    passages={name: Passage(name, "", f"text {name}") for name in "abcdefgh"},
    queries={"q": "one", "r": "two", "s": "three"},
    qrels={"q": {"c": 2, "a": 1}, "r": {"b": 1}, "s": {"d": 0}},
)
RUN = {"q": list("abcdefgh"), "r": list("hgfedcba"), "s": list("abcdefgh")}


@pytest.mark.shared
def test_authors_head_scores(
    shared: Callable[[str], Any], smollm2: LocalModel, tmp_path: Path
) -> None:
    """SCoRe of all 270 heads at both temperatures, by the authors' own detector."""
    expected = shared("goldens/heads_smollm2.json")["by_temperature"]
    cases = [
        Case(Candidates(case["query"], tuple(case["documents"])), case["relevant"])
        for case in shared("goldens/rerank_smollm2.json")["cases"]
        if "relevant" in case
    ]
    options = FindOptions(
        data=[], model=smollm2.path, template="chatml", dtype="float32", cache=tmp_path
    )
    with HeadReader(options) as reader:
        scores = score_heads(reader.read, reader.heads.heads, cases, options.temperature)
    for temperature, by_name in expected.items():
        ours = {
            f"{layer}-{head}": score
            for (layer, head), score in zip(
                scores.heads, scores.core[float(temperature)], strict=True
            )
        }
        assert ours.keys() == by_name.keys()
        for name, score in by_name.items():
            assert ours[name] == pytest.approx(score, abs=1e-4), (temperature, name)


def cases_of(questions: int = 2, **changes: int) -> list[Case]:
    options = FindOptions.checked(data=[], **{"negatives": 3, **changes})
    return detection_cases(COLLECTION, RUN, questions, options)


def test_cases_hold_one_relevant_document_among_hard_negatives() -> None:
    cases = cases_of(positions=4, seed=1)
    assert len(cases) == 8
    for case in cases:
        documents = case.candidates.documents
        positive = {"one": "text c", "two": "text b"}[case.candidates.query]
        assert documents[case.positive] == positive
        assert len(documents) == 4
        assert "text a" not in documents or case.candidates.query == "two", "a less relevant one"
    assert {case.positive for case in cases if case.candidates.query == "one"} == {0, 1, 2, 3}
    first = next(case for case in cases if case.candidates.query == "two")
    others = [text for text in first.candidates.documents if text != "text b"]
    assert others == ["text h", "text g", "text f"], "in the order of the first stage"


def test_the_same_seed_draws_the_same_cases() -> None:
    first = cases_of(negatives=4, seed=3)
    assert first == cases_of(negatives=4, seed=3)
    assert any(first != cases_of(negatives=4, seed=seed) for seed in range(4, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questions": 3}, "2 of 3 questions have a relevant document"),
        ({"negatives": 7}, "1 of 3 questions"),
        ({"negatives": 0}, "negatives: Input should be greater than or equal to 1, got 0"),
        ({"positions": 0}, "positions: Input should be greater than or equal to 1"),
        ({"positions": 9}, "9 positions are more than a list of 4 documents"),
    ],
)
def test_too_little_data_is_named(changes: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        cases_of(**changes)


HEADS = [Head(layer=layer, head=head) for layer in range(2) for head in range(2)]


def scored(attention: Sequence[Sequence[float]], positive: int, *temperatures: float) -> HeadScores:
    array = np.array(attention, dtype=np.float32)
    features = HeadFeatures(array, array, array)
    case = Case(Candidates("query", ("d",) * len(array)), positive)
    return score_heads(lambda *_: features, HEADS, [case], temperatures)


def test_score_is_the_softmax_at_the_relevant_document() -> None:
    attention = [[0.3, 0.0, 0.1, 0.2], [0.1, 0.0, 0.4, 0.2], [0.2, 0.0, 0.1, 0.2]]
    scores = scored(attention, 1, 0.1, 1.0)
    e = np.exp
    assert scores.core[0.1][0] == pytest.approx(e(1) / (e(1) + e(2) + e(3)))
    assert scores.core[1.0][1] == pytest.approx(1 / 3)
    assert scores.qr == pytest.approx([0.1, 0.0, 0.4, 0.2])
    assert scores.ranking("core")[0][:2] == (1, 0)
    assert [head[:2] for head in scores.ranking("qr")] == [(1, 0), (1, 1), (0, 0), (0, 1)]


def test_tiny_temperatures_do_not_overflow() -> None:
    scores = scored([[40.0, 1, 1, 1], [90.0, 1, 1, 1]], 1, 1e-6)
    assert scores.core[1e-6] == pytest.approx([1.0, 0.5, 0.5, 0.5])
    with pytest.raises(InvalidInputError, match=r"temperature: Input should be greater than 0"):
        FindOptions.checked(data=[], temperature=[0.0])
    with pytest.raises(InvalidInputError, match="no questions"):
        score_heads(lambda *_: None, HEADS, [], [0.1])
