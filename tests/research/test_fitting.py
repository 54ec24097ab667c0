from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.research.collection import Collection, Passage
from core_rerank_integrations.research.fit_scoring import calibrate, choose_first_stage
from core_rerank_integrations.research.sources import Drawn, JudgedRun
from core_rerank_integrations.research.weights import (
    JudgedList,
    Trial,
    Weights,
    _Listwise,
    choose_weights,
    fit_weights,
    with_contrast,
)
from core_rerank_integrations.heads.scoring_config import Ranked

USEFUL, HARMFUL, HEADS = 3, 7, 12


def judged(count: int, seed: int, ranked: Ranked = True) -> list[JudgedList]:
    """Lists in which two heads know the relevant document, one of them by avoiding it."""
    draw = np.random.default_rng(seed)
    lists = []
    for number in range(count):
        features = draw.normal(0, 0.02, (6, HEADS))
        grades = np.zeros(6)
        relevant = int(draw.choice(6, p=[0.4, 0.2, 0.16, 0.1, 0.08, 0.06]))
        grades[relevant] = 1
        features[relevant, USEFUL] += 0.04
        features[relevant, HARMFUL] -= 0.04
        documents = tuple(f"{number}-{place}" for place in range(6))
        first_stage = -np.arange(6.0)
        lists.append(JudgedList(str(number), documents, features, grades, ranked, first_stage))
    return lists


def collection_of(lists: list[JudgedList]) -> Collection:
    names = [name for item in lists for name in item.documents]
    return Collection(
        {name: Passage(name, "", name) for name in names},
        {item.query: item.query for item in lists},
        {item.query: {item.documents[int(item.grades.argmax())]: 1} for item in lists},
    )


def test_finds_the_heads_that_know_with_their_signs() -> None:
    weights = fit_weights(judged(200, seed=0), l1=0.05)
    assert set(np.flatnonzero(weights.heads)) == {USEFUL, HARMFUL}
    assert weights.heads[USEFUL] > 0 > weights.heads[HARMFUL]


def test_questions_whose_candidates_do_not_differ_are_left_out() -> None:
    lists = judged(4, seed=0)
    collection = collection_of(lists)
    run = {item.query: [(name, 0.0) for name in item.documents] for item in lists}
    relevant = {query: next(iter(grades)) for query, grades in collection.qrels.items()}
    run["1"] = [item for item in run["1"] if item[0] != relevant["1"]]
    run["2"] = [(relevant["2"], 0.0)]
    run["3"] = [*(item for item in run["3"] if item[0] != relevant["3"]), (relevant["3"], 0.0)]
    drawn = Drawn(JudgedRun(Path(), "train", Path()), collection, run, ["0", "1", "2", "3"])
    assert with_contrast(drawn, 6).queries == ["0", "3"]
    assert with_contrast(drawn._replace(queries=["3"]), 5).queries == []


def test_more_penalty_leaves_fewer_heads() -> None:
    counts = [
        np.count_nonzero(fit_weights(judged(60, seed=1), l1).heads) for l1 in (0.0, 0.02, 0.05, 9.0)
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == HEADS
    assert counts[-1] == 0


def dev_of(relevant: dict[int, int], ranked: Ranked, trusted: float) -> tuple[Any, list[Any]]:
    """Lists whose heads prefer the second of three by ``trusted``.

    Args:
        relevant: How many lists have their relevant document at which place.
        ranked: As of a `JudgedList`.
        trusted: Score of the second; the others have 0.
    """
    features = np.array([[0.0], [trusted], [0.0]])
    lists = []
    for place, count in relevant.items():
        for _ in range(count):
            name = f"{ranked}-{len(lists)}"
            documents = tuple(f"{name}-{i}" for i in range(3))
            grades = np.eye(3)[place]
            given = np.array([1.0, 0.0, 0.0])
            lists.append(JudgedList(name, documents, features, grades, ranked, given))
    return collection_of(lists), lists


def test_a_first_stage_counts_as_much_as_it_must_and_no_more() -> None:
    heads = Weights(np.ones(1), 0.0)
    # ln 2 times the weight has to pass the heads' 1: from 1.5 on it does.
    right = [dev_of({0: 3}, "vectors", 1.0)]
    chosen = choose_first_stage(heads, right)
    assert chosen.rank_weight == 1.5
    assert chosen.rank_weights == {"vectors": 1.5}
    # The first stands 3 / sqrt(2) standard deviations above the second.
    assert chosen.score_weight == 0.5
    wrong = [dev_of({1: 3}, "bm25", 1.0)]
    assert choose_first_stage(heads, wrong) == (0.0, {"bm25": 0.0}, 0.0)


def test_one_weight_for_all_loses_least_where_it_loses_most() -> None:
    heads = Weights(np.ones(1), 0.0)
    better, worse = dev_of({0: 9, 1: 1}, "vectors", 1.0), dev_of({0: 2, 1: 8}, "bm25", 1.0)
    in_no_order = dev_of({2: 5}, False, 1.0)
    chosen = choose_first_stage(heads, [better, worse, in_no_order])
    # Trusting the order gives the first collection 8 lists of 10 more, and costs the other 6.
    assert chosen.rank_weight == 1.5
    assert chosen.rank_weights == {"vectors": 1.5, "bm25": 0.0}
    assert choose_first_stage(heads, [in_no_order]) == (0.0, {}, None)


def test_a_layer_cap_is_a_choice_of_columns() -> None:
    columns = np.arange(HEADS) < HARMFUL
    weights = fit_weights(judged(200, seed=0), 0.05, columns).heads
    assert weights.argmax() == USEFUL
    assert not weights[HARMFUL:].any()


def test_a_head_that_hardly_looks_at_documents_is_not_magnified() -> None:
    lists = judged(200, seed=0)
    faint = [item._replace(features=item.features.copy()) for item in lists]
    for item in faint:
        item.features[:, USEFUL] *= 1e-4
    loud, quiet = (np.abs(fit_weights(group, 0.05).heads) for group in (lists, faint))
    assert loud[USEFUL] > 0
    assert quiet[USEFUL] < 10 * loud.max()


def test_gradient_of_the_loss() -> None:
    draw = np.random.default_rng(5)
    problem = _Listwise.of(judged(4, seed=2), np.ones(HEADS, dtype=bool), np.ones(HEADS))
    weights = draw.normal(size=HEADS)
    _, gradient = problem.loss(weights)
    for place in range(HEADS):
        step = np.zeros(HEADS)
        step[place] = 1e-6
        slope = (problem.loss(weights + step)[0] - problem.loss(weights - step)[0]) / 2e-6
        assert gradient[place] == pytest.approx(slope, abs=1e-6)


def test_the_choice_is_made_on_the_other_questions() -> None:
    train, dev = judged(40, seed=3), judged(80, seed=4)
    seen: list[Trial] = []
    best, trials = choose_weights(
        train, [(collection_of(dev), dev)], [0.0, 0.02, 0.05], progress=seen.append
    )
    assert seen == trials
    assert best.score == max(trial.score for trial in trials)
    assert best.num_heads > 0
    few, _ = choose_weights(train, [(collection_of(dev), dev)], [0.0, 0.02, 0.05], max_heads=4)
    assert few.num_heads <= 4
    with pytest.raises(InvalidInputError, match="leaves between 1 and 2 heads"):
        choose_weights(train, [(collection_of(dev), dev)], [0.0], max_heads=2)


def test_lists_without_a_contrast() -> None:
    empty = [item._replace(grades=np.zeros(6)) for item in judged(3, seed=0)]
    with pytest.raises(InvalidInputError, match="nothing to fit on"):
        fit_weights(empty, 0.01)
    contrasted = judged(20, seed=0)
    np.testing.assert_array_equal(
        fit_weights([*empty, *contrasted], 0.02).heads, fit_weights(contrasted, 0.02).heads
    )
    with pytest.raises(InvalidInputError, match="must not be negative, got -1"):
        fit_weights(contrasted, -1)


def test_heads_of_weights() -> None:
    weights = Weights(np.array([0.0, -2.5, 0.123456789, 0.0]), 0.01)
    heads = weights.chosen([(0, 0), (0, 1), (1, 0), (1, 1)])
    assert [(head.layer, head.head, head.weight) for head in heads] == [
        (0, 1, -2.5),
        (1, 0, 0.123457),
    ]


def test_calibration_finds_the_line_that_made_the_judgments() -> None:
    draw = np.random.default_rng(0)
    scores = draw.normal(0.3, 0.02, 40_000)
    relevant = draw.random(40_000) < 1 / (1 + np.exp(-(100 * scores - 32)))
    found = calibrate([[(scores, relevant.astype(float))]])
    assert (found.slope, found.intercept) == pytest.approx((100, -32), rel=0.05)


def test_each_collection_calibrates_alike() -> None:
    draw = np.random.default_rng(0)
    few, many = ((draw.normal(size=count), (draw.random(count) < share).astype(float))
                 for count, share in ((4_000, 0.1), (40_000, 0.3)))  # fmt: skip
    found = calibrate([[few], [many]])
    assert found.probabilities(np.zeros(1)) == pytest.approx([0.2], abs=0.01)
    with pytest.raises(InvalidInputError, match="both relevant and irrelevant"):
        calibrate([[(np.zeros(3), np.zeros(3))]])
