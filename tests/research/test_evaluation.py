from __future__ import annotations

import json
from math import exp, log2
from pathlib import Path

import pytest
from support.adapters import adapted, write_adapter

from core_rerank_integrations import CoReReranker, HeadSet
from core_rerank_integrations._internal.resources import resource_folder
from core_rerank_integrations.errors import InvalidInputError, StorageError
from core_rerank_integrations.heads.shipped import default_head_set
from core_rerank_integrations.method.windows import Candidates
from core_rerank_integrations.models.local_model import LocalModel
from core_rerank_integrations.research.collection import Collection, Passage
from core_rerank_integrations.research.evaluation import Evaluation, compare
from core_rerank_integrations.research.measures import (
    expected_calibration_error,
    mean_measures,
    measure,
    reliability,
)
from core_rerank_integrations.research.methods import JointReranker, Method, named_method
from core_rerank_integrations.research.plots import check_picture, plot_head_map
from core_rerank_integrations.research.report import save_report
from core_rerank_integrations.settings import RerankerSettings

LOW = HeadSet.from_pairs(
    [(2, 1), (5, 0)],
    name="low",
    template="chatml",
    scoring={"documents_per_prompt": 2, "rank_weight": 0.1},
)
HIGH = HeadSet.from_pairs(
    [(7, 3)],
    name="high",
    template="chatml",
    scoring={"documents_per_prompt": 3, "drop_outliers": False},
)
FLOAT32 = RerankerSettings(dtype="float32")


def test_measures_against_their_definitions() -> None:
    qrels = {"q": {"a": 2, "b": 1}, "r": {"c": 1}, "s": {"d": 1}}
    measured = measure(qrels, {"q": ["x", "b", "a"], "r": ["c", "x"]})
    gain = 1 / log2(3) + 2 / log2(4)
    assert measured["q"]["nDCG@10"] == pytest.approx(gain / (2 + 1 / log2(3)))
    assert measured["q"]["nDCG@1"] == 0
    assert measured["q"]["RR"] == pytest.approx(1 / 2)
    assert measured["q"]["AP"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert measured["r"]["R@5"] == 1
    assert measured["s"]["nDCG@10"] == 0, "a query without candidates counts"
    means = mean_measures(qrels, {"q": ["x", "b", "a"], "r": ["c", "x"]})
    assert means["RR"] == pytest.approx((1 / 2 + 1 + 0) / 3)


def test_one_pass_for_all_methods_gives_each_rerankers_scores(smollm2: LocalModel) -> None:
    query = "How long does the crossing take?"
    documents = ["Eighteen minutes by ferry.", "Bread rises.", "No crossings in a gale.", "Gulls."]
    methods = [
        Method("first-stage"),
        Method("low", LOW),
        Method("low+first-stage", LOW, "other"),
        Method("high", HIGH),
        Method("reversed", LOW.with_scoring(best_last=True)),
        Method("alone", LOW.with_scoring(documents_per_prompt=1), "other"),
    ]
    joint = JointReranker(smollm2, methods, FLOAT32)
    lists = [Candidates(query, tuple(documents)), Candidates("Who bakes?", tuple(documents[1:]))]
    scores, others = joint.scores(lists)
    collection = Collection(
        {text: Passage(text, "", text) for text in documents}, {"q": query, "none": "?"}, {}
    )
    rankings = joint.rank(collection, {"q": documents}, ["q", "none"])
    joint.close()
    for method in methods:
        ranking = rankings[method.name]["q"]
        expected = dict(zip(documents, scores[method.name], strict=True))
        assert dict(ranking) == pytest.approx(expected, abs=1e-6)
        assert ranking == sorted(ranking, key=lambda item: -item[1])
        assert rankings[method.name]["none"] == [], "a query without candidates"
    assert scores["first-stage"].tolist() == [0, -1, -2, -3]
    assert others["first-stage"].tolist() == [0, -1, -2]
    for method in methods[1:]:
        with CoReReranker(smollm2.path, heads=method.heads, dtype="float32") as reranker:
            for (question, texts, _), by_method in zip(lists, (scores, others), strict=True):
                expected = reranker.score(question, texts, first_stage=method.first_stage)
                assert by_method[method.name] == pytest.approx(expected, abs=1e-6)
    distinct = {tuple(scores[method.name].round(4)) for method in methods}
    assert len(distinct) == len(methods), "each is a method of its own"


def test_methods_with_and_without_an_adapter_are_compared(
    smollm2: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORE_RERANK_CACHE", str(tmp_path / "cache"))
    write_adapter(tmp_path / "adapter", smollm2, size=0.05)
    tuned = adapted(LOW, tmp_path / "adapter", smollm2, layers=6)
    documents = ("Eighteen minutes by ferry.", "Bread rises.", "No crossings in a gale.")
    joint = JointReranker(smollm2, [Method("low", LOW), Method("tuned", tuned)], FLOAT32)
    (scores,) = joint.scores([Candidates("How long is the crossing?", documents)])
    joint.close()
    for name, heads in (("low", LOW), ("tuned", tuned)):
        with CoReReranker(smollm2.path, heads, dtype="float32") as reranker:
            expected = reranker.score("How long is the crossing?", documents)
        assert scores[name] == pytest.approx(expected, abs=1e-6)
    assert scores["low"] != pytest.approx(scores["tuned"], abs=1e-3)


def test_templates_that_differ_cannot_share_a_pass(smollm2: LocalModel) -> None:
    other = LOW.model_copy(update={"template": "plain"})
    with pytest.raises(InvalidInputError, match="different prompt templates"):
        JointReranker(smollm2, [Method("a", LOW), Method("b", other)], FLOAT32)


def test_comparison_and_report(tmp_path: Path) -> None:
    collection = Collection.load(resource_folder("examples/data"))
    queries = list(collection.queries)[:8]
    passages = list(collection.passages)
    run = dict.fromkeys(queries, passages[:12])
    run |= {query: [*passages[:11], min(collection.qrels[query])] for query in queries}
    relevant = {
        collection.passages[document].content
        for query in queries
        for document in collection.qrels[query]
    }

    order = {
        query: [(name, -float(rank)) for rank, name in enumerate(names)]
        for query, names in run.items()
    }
    perfect = {
        query: sorted(
            ((name, float(collection.passages[name].content in relevant)) for name in names),
            key=lambda item: -item[1],
        )
        for query, names in run.items()
    }
    methods = [Method("first-stage"), Method("oracle", LOW), Method("same", HIGH)]
    rankings = {"first-stage": order, "oracle": perfect, "same": order}
    results = compare(collection.qrels, methods, rankings)
    first, oracle, same = results
    assert oracle.means["nDCG@10"] > first.means["nDCG@10"]
    assert first.p_value is None
    assert same.p_value == 1
    assert oracle.p_value is not None
    assert oracle.p_value < 0.05

    save_report(tmp_path / "report", Evaluation(results, {"queries": 8}), plots=True)
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert report["methods"]["oracle"]["mean"] == oracle.means
    assert set(report["methods"]["same"]["per_query"]) == set(queries)
    text = (tmp_path / "report/report.md").read_text()
    assert f"{oracle.means['nDCG@10']:.3f}" in text
    assert "- queries: 8" in text
    assert "![gains.png](gains.png)" in text
    assert (tmp_path / "report/gains.png").exists()
    lines = (tmp_path / "report/oracle.trec").read_text().splitlines()
    assert len(lines) == sum(len(documents) for documents in run.values())


NAMES = ("../../outside", "/absolute", "..", "a b|c\n$x^2$", "\x00", "", "C:\\x", "l" * 500)


@pytest.mark.parametrize("name", NAMES)
def test_a_head_set_may_have_any_name_and_the_report_stays_in_its_folder(
    name: str, tmp_path: Path, smollm2: LocalModel
) -> None:
    ranked = {"provenance": {"ranked_heads": [(2, 1, 0.5), (5, 0, 0.25)]}}
    HeadSet.from_pairs([(2, 1)], name=name, **ranked).save(tmp_path / "heads.json")
    method = named_method(str(tmp_path / "heads.json"), smollm2)
    rankings = {"q": [("a", 2.0), ("b", -2.0)]}
    first = Method("first-stage")
    results = compare(
        {"q": {"a": 1}}, [first, method], {first.name: rankings, method.name: rankings}
    )
    folder = tmp_path / "deep" / "report"
    save_report(folder, Evaluation(results, {}), plots=True)
    written = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert written - {tmp_path / "heads.json"} == set(folder.iterdir())
    assert {"report.json", "gains.png", f"{method.name}.trec"} <= {path.name for path in written}
    tagged = (folder / f"{method.name}.trec").read_text().splitlines()[0]
    assert len(tagged.split()) == 6
    assert "**first-stage** |" in (folder / "report.md").read_text()


def test_the_default_heads_are_a_method(smollm2: LocalModel) -> None:
    for allows_adapter in (True, False):
        method = named_method("default+bm25", smollm2, allows_adapter=allows_adapter)
        expected = default_head_set(smollm2.model_id, allows_adapter=allows_adapter)
        assert method == Method("default+bm25", expected, "bm25")
        assert (expected.adapter is not None) == allows_adapter


@pytest.mark.parametrize("name", NAMES[:-1])
def test_a_method_of_your_own_needs_a_plain_name(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        Method(name=name, heads=LOW)


def test_pictures_of_unknown_formats_are_refused(tmp_path: Path) -> None:
    check_picture(tmp_path / "map.PNG")
    for path in (tmp_path / "map.xyz", tmp_path / "map"):
        with pytest.raises(InvalidInputError, match=r"must end with one of .*\.png"):
            check_picture(path)
    blocked = tmp_path / "file"
    blocked.write_text("")
    ranked = HeadSet.from_pairs([(1, 1)], provenance={"ranked_heads": [(1, 1, 0.5)]})
    with pytest.raises(StorageError, match="cannot write"):
        plot_head_map(ranked, blocked / "map.png")


def test_calibration_error_against_its_definition() -> None:
    bins = reliability([0.05, 0.05, 0.15, 0.95, 1.0], [0, 1, 0, 1, 1])
    assert [tuple(part) for part in bins] == [
        (0.05, 0.5, 2),
        (0.15, 0.0, 1),
        (pytest.approx(0.975), 1.0, 2),
    ]
    expected = (2 * 0.45 + 1 * 0.15 + 2 * 0.025) / 5
    assert expected_calibration_error(bins) == pytest.approx(expected)


def test_calibrated_methods_are_judged_by_their_probabilities() -> None:
    calibrated = LOW.with_scoring(
        documents_per_prompt=1, calibration={"slope": 1.0, "intercept": 0.0}
    )
    methods = [Method("alone", calibrated), Method("ranked", calibrated, "other")]
    rankings = {"q": [("a", 2.0), ("b", -2.0)]}
    alone, ranked = compare({"q": {"a": 1}}, methods, dict.fromkeys(("alone", "ranked"), rankings))
    sure = 1 / (1 + exp(-2))
    assert alone.reliability == [
        (pytest.approx(1 - sure), 0.0, 1),
        (pytest.approx(sure), 1.0, 1),
    ]
    assert ranked.reliability == []
