from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax

from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.heads.head_set import Head
from core_rerank_integrations.heads.scoring_config import FirstStage
from core_rerank_integrations.research.collection import Collection, Passage
from core_rerank_integrations.research.options import FitOptions
from core_rerank_integrations.research.scoring_fit import calibrate, choose_first_stage
from core_rerank_integrations.research.sources import JudgedRun, Sample
from core_rerank_integrations.research.weights import (
    JudgedList,
    ListwiseLoss,
    choose_weights,
    fit_weights,
    selected_heads,
)

USEFUL, HARMFUL, HEADS = 3, 7, 12


def judged(count: int, seed: int) -> list[JudgedList]:
    """Return lists in which two heads know the relevant document, one of them by avoiding it."""
    draw = np.random.default_rng(seed)
    lists = []
    for number in range(count):
        features = draw.normal(0, 0.02, (6, HEADS))
        grades = np.zeros(6)
        relevant = int(draw.choice(6, p=[0.4, 0.2, 0.16, 0.1, 0.08, 0.06]))
        grades[relevant] = 1
        features[relevant, USEFUL] += 0.04
        features[relevant, HARMFUL] -= 0.04
        documents = tuple(f"{number}-{rank}" for rank in range(6))
        scores = -np.arange(6.0)
        lists.append(JudgedList(str(number), documents, features, grades, "other", scores))
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
    assert set(np.flatnonzero(weights)) == {USEFUL, HARMFUL}
    assert weights[USEFUL] > 0 > weights[HARMFUL]


def test_questions_whose_candidates_do_not_differ_are_left_out() -> None:
    lists = judged(4, seed=0)
    collection = collection_of(lists)
    run = {item.query: [(name, 0.0) for name in item.documents] for item in lists}
    relevant = {query: next(iter(grades)) for query, grades in collection.qrels.items()}
    run["1"] = [item for item in run["1"] if item[0] != relevant["1"]]
    run["2"] = [(relevant["2"], 0.0)]
    run["3"] = [*(item for item in run["3"] if item[0] != relevant["3"]), (relevant["3"], 0.0)]
    sample = Sample(JudgedRun(Path(), "train", Path()), collection, run, ["0", "1", "2", "3"])
    assert sample.with_contrast(6).queries == ["0", "3"]
    assert sample._replace(queries=["3"]).with_contrast(5).queries == []


def test_more_penalty_leaves_fewer_heads() -> None:
    counts = [
        np.count_nonzero(fit_weights(judged(60, seed=1), l1)) for l1 in (0.0, 0.02, 0.05, 9.0)
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == HEADS
    assert counts[-1] == 0


def dev_of(
    relevant: dict[int, int], first_stage: FirstStage | None, trusted: float
) -> tuple[Any, list[Any]]:
    """Return lists whose heads prefer the second of three documents.

    Args:
        relevant: Number of lists by the index of their relevant document.
        first_stage: Kind of the first stage.
        trusted: Score of the second document; the others have 0.
    """
    features = np.array([[0.0], [trusted], [0.0]])
    lists = []
    for index, count in relevant.items():
        for _ in range(count):
            name = f"{first_stage}-{len(lists)}"
            documents = tuple(f"{name}-{i}" for i in range(3))
            grades = np.eye(3)[index]
            scores = np.array([1.0, 0.0, 0.0])
            lists.append(JudgedList(name, documents, features, grades, first_stage, scores))
    return collection_of(lists), lists


def test_a_first_stage_counts_as_much_as_it_must_and_no_more() -> None:
    heads = np.ones(1)
    # ln 2 times the weight has to pass the heads' 1: from 1.5 on it does.
    right = [dev_of({0: 3}, "dense", 1.0)]
    chosen = choose_first_stage(heads, right)
    assert chosen.rank_weight == 1.5
    assert chosen.rank_weights == {"dense": 1.5}
    # The first stands 3 / sqrt(2) standard deviations above the second.
    assert chosen.score_weight == 0.5
    wrong = [dev_of({1: 3}, "bm25", 1.0)]
    assert choose_first_stage(heads, wrong) == (0.0, {"bm25": 0.0}, 0.0)


def test_one_weight_for_all_loses_least_where_it_loses_most() -> None:
    heads = np.ones(1)
    better, worse = dev_of({0: 9, 1: 1}, "dense", 1.0), dev_of({0: 2, 1: 8}, "bm25", 1.0)
    in_no_order = dev_of({2: 5}, None, 1.0)
    chosen = choose_first_stage(heads, [better, worse, in_no_order])
    # Trusting the order gives the first collection 8 lists of 10 more, and costs the other 6.
    assert chosen.rank_weight == 1.5
    assert chosen.rank_weights == {"dense": 1.5, "bm25": 0.0}
    assert choose_first_stage(heads, [in_no_order]) == (0.0, {}, None)


def test_a_layer_cap_leaves_the_useful_heads_below() -> None:
    lists = [item._replace(features=item.features[:, :HARMFUL]) for item in judged(200, seed=0)]
    assert fit_weights(lists, 0.05).argmax() == USEFUL


def test_a_head_that_hardly_looks_at_documents_is_not_magnified() -> None:
    lists = judged(200, seed=0)
    faint = [item._replace(features=item.features.copy()) for item in lists]
    for item in faint:
        item.features[:, USEFUL] *= 1e-4
    loud, quiet = (np.abs(fit_weights(group, 0.05)) for group in (lists, faint))
    assert loud[USEFUL] > 0
    assert quiet[USEFUL] < 10 * loud.max()


def test_gradient_of_the_loss() -> None:
    draw = np.random.default_rng(5)
    lists = judged(4, seed=2)
    lists[1] = lists[1]._replace(features=lists[1].features[:3], grades=np.array([0.0, 2.0, 1.0]))
    problem = ListwiseLoss([item.features for item in lists], [item.grades for item in lists])
    weights = draw.normal(size=HEADS)
    loss, gradient = problem.value_and_gradient(weights)
    shares = [softmax(item.features @ weights) for item in lists]
    targets = [item.grades / item.grades.sum() for item in lists]
    expected = [-target @ np.log(share) for target, share in zip(targets, shares, strict=True)]
    assert loss == pytest.approx(np.mean(expected))
    for head in range(HEADS):
        step = 1e-6 * np.eye(HEADS)[head]
        above, _ = problem.value_and_gradient(weights + step)
        below, _ = problem.value_and_gradient(weights - step)
        assert gradient[head] == pytest.approx((above - below) / 2e-6, abs=1e-6)


def test_the_choice_is_made_on_the_other_questions() -> None:
    train, dev = judged(40, seed=3), judged(80, seed=4)
    best, trials = choose_weights(train, [(collection_of(dev), dev)], [0.0, 0.02, 0.05])
    assert [trial.l1 for trial in trials] == [0.05, 0.02, 0.0]
    assert best.ndcg == max(trial.ndcg for trial in trials)
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
        fit_weights([*empty, *contrasted], 0.02), fit_weights(contrasted, 0.02)
    )
    with pytest.raises(InvalidInputError, match=r"l1: Input should be .* equal to 0, got \[-1\]"):
        FitOptions.checked(train=[], dev=[], l1=[-1])


def test_heads_of_weights() -> None:
    every = [Head(layer=layer, head=head) for layer in (0, 1) for head in (0, 1)]
    heads = selected_heads(np.array([0.0, -2.5, 0.123456789, 0.0]), every)
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
