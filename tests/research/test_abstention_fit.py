"""The answerability of lists."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from support.cli import failed, run
from support.head_sets import CALIBRATED

from core_rerank_integrations import CoReReranker, HeadSet
from core_rerank_integrations._internal.resources import resource_folder
from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.heads.scoring_config import Abstention
from core_rerank_integrations.heads.shipped import named_head_set
from core_rerank_integrations.research.abstention_fit import (
    JudgedLogOdds,
    fit_abstention,
    fit_answerability,
    judged_log_odds,
)
from core_rerank_integrations.research.collection import Collection, Passage, save_run
from core_rerank_integrations.research.options import AbstentionOptions
from core_rerank_integrations.research.sources import JudgedRun, Sample

HANDBOOK = resource_folder("examples/data")


def made_up(count: int, seed: int, moved: float = 1) -> list[JudgedLogOdds]:
    """Return lists of ten; a question moves all its candidates, a relevant one is higher."""
    draw = np.random.default_rng(seed)
    lists = []
    for _ in range(count):
        odds = draw.normal(-4, moved) + draw.normal(0, 0.7, 10)
        odds[0] += 3
        lists.append(JudgedLogOdds(odds[:1], odds[1:]))
    return lists


def probabilities(odds: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-odds))


def errors(abstention: Abstention, lists: list[JudgedLogOdds]) -> float:
    answered, unanswered = (
        np.array([abstention.answerability(probabilities(odds)) for odds in kind])
        for kind in zip(*(item.lists() for item in lists), strict=True)
    )
    return float(np.mean(answered < 0.5) + np.mean(unanswered >= 0.5)) / 2


def test_what_stands_out_of_its_list_answers() -> None:
    abstention = fit_answerability([made_up(200, seed=0)])
    assert abstention.mean == pytest.approx(-4, abs=0.3)
    assert abstention.candidates <= 1, "questions move their lists, so a list says more than all"
    alike = fit_answerability([made_up(200, seed=0, moved=0)])
    assert alike.candidates == 30, "questions move nothing, so all lists say more than one"
    other = made_up(200, seed=1)
    assert errors(abstention, other) < 0.1
    # By the best candidate's own probability, whatever the list, it cannot be told so well.
    kinds = zip(*(item.lists() for item in other), strict=True)
    best = [np.array([odds.max() for odds in kind]) for kind in kinds]
    apart = min(
        np.mean(best[0] < border) + np.mean(best[1] >= border) for border in np.concatenate(best)
    )
    assert errors(abstention, other) < apart / 2


def test_the_threshold_loses_as_many_lists_as_allowed() -> None:
    for share in (0.0, 0.05, 0.3):
        abstention = fit_answerability([made_up(400, seed=0)], share)
        answerability = [
            abstention.answerability(
                probabilities(item.shortened(size, random.Random(1)).lists()[0])
            )
            for item in made_up(400, seed=1)
            for size in (1, 2, 3, 5, 9, 9)
        ]
        assert np.mean(np.array(answerability) < abstention.threshold) == pytest.approx(
            share, abs=0.05
        )
    with pytest.raises(InvalidInputError, match=r"max_false_abstentions: .* got 1\.5"):
        AbstentionOptions.checked(heads=CALIBRATED, lists=[], max_false_abstentions=1.5)


def test_short_lists_are_judged_too() -> None:
    abstention = fit_answerability([made_up(200, seed=0)])
    short = [item.shortened(1, random.Random(0)) for item in made_up(200, seed=1)]
    assert {len(odds) for item in short for odds in item.lists()} == {1}
    assert errors(abstention, short) < 0.25


def test_each_collection_counts_the_same() -> None:
    few, many = made_up(20, seed=0), made_up(200, seed=1)
    lower = [JudgedLogOdds(item.relevant - 3, item.others) for item in few]  # Nothing stands out.
    assert errors(fit_answerability([lower, many]), many) > errors(
        fit_answerability([[], many]), many
    )
    with pytest.raises(InvalidInputError, match="nothing to fit on"):
        fit_answerability([[]])


def test_what_answers_unjudged_is_left_out(calibrated: CoReReranker, tmp_path: Path) -> None:
    texts = {"a": "Alexander Bell did.", "b": "Bell, unjudged.", "c": "Bread.", "d": "Gulls."}
    collection = Collection(
        {name: Passage(name, "", text) for name, text in texts.items()},
        {"q": "Who patented the telephone?", "none": "Who?"},
        {"q": {"a": 1}, "none": {"a": 0}},
        {"q": ["BELL"]},
    )
    ranking = [(name, -float(rank)) for rank, name in enumerate(texts)]
    source = JudgedRun(tmp_path, "test", tmp_path / "run")
    sample = Sample(source, collection, {"q": ranking, "none": ranking}, ["q"])
    (judged,) = judged_log_odds(sample, calibrated, 20)
    assert (len(judged.relevant), len(judged.others)) == (1, 2)
    assert judged_log_odds(sample, calibrated, 1) == []
    (nothing,) = judged_log_odds(sample._replace(queries=["none"]), calibrated, 20)
    assert (len(nothing.relevant), len(nothing.others)) == (0, 4)
    collection.answers.clear()
    assert len(judged_log_odds(sample, calibrated, 20)[0].others) == 3


@pytest.mark.model
def test_the_command_fits_it(tmp_path: Path) -> None:
    collection = Collection.load(HANDBOOK)
    ranking = {
        query: [(name, -float(rank)) for rank, name in enumerate([*grades, *others])]
        for query, grades in list(collection.qrels.items())[:4]
        for others in [[name for name in list(collection.passages)[:6] if name not in grades]]
    }
    save_run(tmp_path / "run.trec", ranking, "made-up")
    lists = f"{HANDBOOK}:test:{tmp_path / 'run.trec'}:4"
    arguments = ("--lists", lists, "--output", str(tmp_path / "new.json"))
    shipped = "fast-smollm2-135m-instruct"
    assert "Wrote" in run("heads", "abstention", "--heads", shipped, *arguments)
    fitted = HeadSet.load(tmp_path / "new.json")
    assert fitted.scoring.abstention is not None
    assert fitted.provenance.details["abstention"] == ["data, test, run.trec, 4 questions"]
    without = fitted.with_scoring(abstention=None)
    assert without.heads == named_head_set(shipped).heads
    refused = failed("heads", "abstention", "--heads", "core-smollm2-135m-instruct", *arguments)
    assert "are not calibrated" in refused
    with pytest.raises(InvalidInputError, match="are not calibrated"):
        fit_abstention(
            AbstentionOptions(heads=CALIBRATED.with_documents_per_prompt(5), lists=[lists])
        )


def test_lists_that_hold_nothing_relevant_count_as_unanswered(
    calibrated: CoReReranker, tmp_path: Path
) -> None:
    path = tmp_path / "lists.jsonl"
    path.write_text(
        '{"question": "Tickets?", "right": "The kiosk sells tickets.", "wrong": ["Fog."]}\n'
        '{"question": "Tea?", "right": [], "wrong": ["The kiosk sells tickets.", "Fog."]}\n'
    )
    source = JudgedRun.parse(str(path))
    sample = Sample(source, *source.load(), ["1", "2"])
    judged = judged_log_odds(sample, calibrated, 20)
    assert [(len(item.relevant), len(item.others)) for item in judged] == [(1, 1), (0, 2)]
    nothing = fit_answerability([[*made_up(60, seed=0), *[judged[1]] * 30]])
    assert nothing.threshold > 0
