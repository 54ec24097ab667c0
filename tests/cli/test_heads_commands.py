"""Finding, fitting and evaluating on the demo's handbook, with the real small model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.cli import failed, run

from core_rerank_integrations import HeadSet
from core_rerank_integrations._internal.resources import resource_folder
from core_rerank_integrations.method.list_scores import WindowAttention
from core_rerank_integrations.research.collection import Collection, save_run
from core_rerank_integrations.scorer import AttentionScorer

pytestmark = pytest.mark.commands

HANDBOOK = resource_folder("examples/data")
MODEL = ("--model", "smollm2-135m")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a run that has the relevant passages of each question among the first ten."""
    collection = Collection.load(HANDBOOK)
    passages = list(collection.passages)
    ranking = {}
    for number, (query, grades) in enumerate(collection.qrels.items()):
        documents = [name for name in passages[number : number + 10] if name not in grades]
        documents[number % 3 : number % 3] = grades
        ranking[query] = [(name, -float(rank)) for rank, name in enumerate(documents)]
    folder = tmp_path_factory.mktemp("run")
    save_run(folder / "run.trec", ranking, "made-up")
    return folder


def judged(folder: Path, questions: str = "") -> str:
    return f"{HANDBOOK}:test:{folder / 'run.trec'}{questions}"


def find(folder: Path, name: str, *options: str) -> tuple[str, ...]:
    return (
        "heads", "find", *MODEL, "--data", judged(folder),
        "--output", str(folder / f"{name}.json"), "--questions", "3",
        "--negatives", "3", "--cache", str(folder / "cache"), "--max-layer", "18", *options,
    )  # fmt: skip


@pytest.mark.model
def test_found_heads_have_evidence_and_can_be_used(folder: Path) -> None:
    plot = folder / "map.png"
    layout = ("--documents-per-prompt", "5", "--best-last")
    output = run(*find(folder, "found", "--num-heads", "4", "--plot", str(plot), *layout))
    assert "Wrote" in output
    found = HeadSet.load(folder / "found.json")
    assert found.model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (found.name, found.provenance.method, found.template) == ("found", "core", "chatml")
    assert (found.scoring.documents_per_prompt, found.scoring.best_last) == (5, True)
    assert len(found.heads) == 4
    assert len(found.provenance.ranked_heads) == 19 * 9
    assert [head.score for head in found.heads] == [
        score for _, _, score in found.provenance.ranked_heads[:4]
    ]
    assert found.provenance.details["prompts"] == 6
    assert found.provenance.details["temperature"] == 0.001
    scores = json.loads((folder / "found.scores.json").read_text())
    assert set(scores["core"]) == {"0.001", "0.1"}
    assert len(scores["qr"]) == 19 * 9
    assert plot.read_bytes().startswith(b"\x89PNG")
    best = run("rerank", *MODEL, "--heads", str(folder / "found.json"), "--query", "bread",
               "--documents", "-", "--top-n", "1", typed="the tide\nbread is baked\n")  # fmt: skip
    assert "bread is baked" in best


@pytest.mark.model
def test_a_second_run_writes_the_same_heads_without_the_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(*find(folder, "first"))
    monkeypatch.setattr(AttentionScorer, "read", lambda *_: pytest.fail("computed again"))
    run(*find(folder, "second"))
    first, second = (HeadSet.load(folder / f"{name}.json") for name in ("first", "second"))
    assert first.heads == second.heads
    assert first.provenance.ranked_heads == second.provenance.ranked_heads
    run(*find(folder, "qr", "--method", "qr"))
    assert HeadSet.load(folder / "qr.json").provenance.method == "qr"


@pytest.mark.model
def test_heads_of_several_collections(folder: Path) -> None:
    run(*find(folder, "twice", "--data", judged(folder)))
    run(*find(folder, "once"))
    twice, once = (HeadSet.load(folder / f"{name}.json") for name in ("twice", "once"))
    assert (twice.provenance.details["questions"], twice.provenance.details["prompts"]) == (6, 12)
    assert twice.provenance.details["data"] == ["data", "data"]
    expected = {(layer, head): score for layer, head, score in once.provenance.ranked_heads}
    averaged = {(layer, head): score for layer, head, score in twice.provenance.ranked_heads}
    assert averaged == pytest.approx(expected), "the same twice is the same on average"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--negatives", "40"), "lower --questions or --negatives"),
        (("--prune", "0.5"), "give a highest layer or a share to prune, not both"),
        (("--data", f"{HANDBOOK}:train:run"), "cannot read"),
        (("--max-layer", "30"), "between 0 and 29"),
        (("--temperature", "0"), "temperature: Input should be greater than 0"),
        (("--data", "elsewhere"), "[:KIND] or FILE.jsonl[:N], got 'elsewhere'"),
    ],
)
def test_bad_input_to_find(folder: Path, options: tuple[str, ...], message: str) -> None:
    assert message in failed(*find(folder, "bad", *options))
    assert not (folder / "bad.json").exists()


@pytest.mark.model
def test_an_interrupted_run_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = AttentionScorer.read
    done: list[int] = []

    def interrupted(self: AttentionScorer, *arguments: Any) -> list[WindowAttention]:
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(1)
        return read(self, *arguments)

    cache = ("--cache", str(folder / "interrupted"))
    monkeypatch.setattr(AttentionScorer, "read", interrupted)
    with pytest.raises((AssertionError, KeyboardInterrupt)):
        run(*find(folder, "interrupted", *cache))
    assert not (folder / "interrupted.json").exists()
    done.clear()
    run(*find(folder, "interrupted", *cache))
    assert len(done) == 2, "four of six prompts were kept"


def fit(folder: Path, name: str, *options: str) -> tuple[str, ...]:
    source = judged(folder, ":6")  # Six other questions for each.
    return (
        "heads", "fit", *MODEL, "--train", source, "--dev", source,
        "--candidates", "5", "--dev-candidates", "5", "--max-layer", "18",
        "--cache", str(folder / "cache"), "--output", str(folder / f"{name}.json"), *options,
    )  # fmt: skip


@pytest.mark.model
def test_fitted_heads_and_their_evaluation(folder: Path) -> None:
    output = run(*fit(folder, "fit-small", "--l1", "0.05", "--l1", "0.2"))
    assert "nDCG@10 on dev" in output
    fitted = HeadSet.load(folder / "fit-small.json")
    assert fitted.provenance.method == "fit"
    assert fitted.scoring.documents_per_prompt == 1
    assert fitted.scoring.calibration is not None
    assert not fitted.scoring.drop_outliers
    assert any(head.weight != 1 for head in fitted.heads)
    assert fitted.provenance.details["lists"] == 6
    assert fitted.scoring.score_weight is not None
    assert fitted.scoring.rank_weights == {}

    assert not fitted.scoring.best_last
    run(*fit(folder, "reversed", "--l1", "0.05", "--best-last", "--documents-per-prompt", "2"))
    reversed_fit = HeadSet.load(folder / "reversed.json")
    scoring = reversed_fit.scoring
    assert (scoring.best_last, scoring.documents_per_prompt) == (True, 2)
    assert scoring.calibration is None
    assert reversed_fit.heads != fitted.heads
    run(*find(folder, "core-small", "--num-heads", "4"))
    report = folder / "report"
    output = run(
        "evaluate", *MODEL, "--data", str(HANDBOOK), "--run", str(folder / "run.trec"),
        "--methods", f"first-stage, {folder / 'core-small.json'},"
        f"{folder / 'fit-small.json'}, {folder / 'fit-small.json'}+first-stage",
        "--curve", str(folder / "core-small.json"), "--queries", "4", "--candidates", "5",
        "--timed", "1", "--output", str(report), "--plots",
    )  # fmt: skip
    assert "| **" in output
    content = json.loads((report / "report.json").read_text())
    assert content["about"]["queries"] == 4
    names = list(content["methods"])
    assert names[0] == "first-stage"
    assert {"core-small", "core-small@8", "fit-small+first-stage"} < set(names)
    assert (report / "fit-small+first-stage.trec").exists()
    for method in content["methods"].values():
        assert len(method["per_query"]) == 4
        assert 0 <= method["mean"]["nDCG@10"] <= 1
    assert sum(part["candidates"] for part in content["methods"]["fit-small"]["reliability"]) == 20
    assert "Expected calibration error of fit-small: " in output
    pictures = ("heads.png", "costs.png", "gains.png", "map-core-small.png")
    for picture in (*pictures, "reliability-fit-small.png"):
        assert (report / picture).read_bytes().startswith(b"\x89PNG")
        assert picture in (report / "report.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--train", "nowhere"), "[:KIND] or FILE.jsonl[:N], got 'nowhere'"),
        (("--train", "no:test:run"), "cannot read"),
        (("--l1", "-1"), "l1: Input should be greater than or equal to 0"),
        (("--prune", "0.5", "--max-heads", "1"), "not both"),
    ],
)
def test_bad_input_to_fit(folder: Path, options: tuple[str, ...], message: str) -> None:
    assert message in failed(*fit(folder, "bad", *options))


@pytest.mark.parametrize(("flag", "value"), [("--backend", "vlmm"), ("--method", "icr")])
def test_unknown_choices_are_usage_errors(folder: Path, flag: str, value: str) -> None:
    message = failed(*find(folder, "bad", flag, value), exit_code=2)
    assert f"Invalid value for '{flag}'" in message
    assert f"'{value}' is not one of" in message


def test_questions_are_fitted_on_or_judged_by_but_not_both(folder: Path) -> None:
    arguments = fit(folder, "bad", "--train", judged(folder, ":25"))
    assert "25 questions were asked for, and 18 of 30 are left" in failed(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--methods", "first-stage"), "at least one method beside the first stage"),
        (("--methods", "core,core"), "methods named twice: core"),
        (("--methods", "nonsense"), "'nonsense' is neither"),
        (("--methods", "core@many"), "a number of heads after @"),
        (("--methods", "core+colbert"), "'core+colbert' is neither"),
        (("--methods", "core-mistral-7b-instruct-v0.3"), "was found on mistralai"),
        (("--methods", "icr", "--curve", "icr"), "needs a head set with a ranking"),
        (("--run", "nowhere.trec"), "cannot read nowhere.trec"),
        (("--backend", "vllm", "--device", "cpu"), "device='cpu' is not for 'vllm'"),
    ],
)
def test_bad_input_to_evaluate(folder: Path, options: tuple[str, ...], message: str) -> None:
    arguments = {
        "--data": str(HANDBOOK), "--run": str(folder / "run.trec"), "--output": str(folder / "bad"),
        **dict(zip(options[::2], options[1::2], strict=True)),
    }  # fmt: skip
    assert message in failed(
        "evaluate", *MODEL, *(part for item in arguments.items() for part in item)
    )
    assert not (folder / "bad").exists()
