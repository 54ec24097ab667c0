from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core_rerank_integrations import Head, HeadSet
from core_rerank_integrations._internal.resources import resource_folder
from core_rerank_integrations.errors import HeadSetError
from core_rerank_integrations.heads import shipped
from core_rerank_integrations.heads.head_set import Adapter, ModelShape, Provenance
from core_rerank_integrations.heads.scoring_config import Calibration, ScoringConfig
from core_rerank_integrations.heads.shipped import (
    default_head_set,
    head_set_for,
    named_head_set,
    shipped_head_sets,
)
from core_rerank_integrations.method.templates import TEMPLATES

SMOLLM2 = ModelShape(num_layers=30, num_heads=9, model_type="llama")


def pairs(head_set: HeadSet) -> list[tuple[int, int]]:
    return [(head.layer, head.head) for head in head_set.heads]


def written(folder: Path, content: Any, name: str = "heads.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_own_format_survives_a_round_trip(tmp_path: Path) -> None:
    head_set = HeadSet(
        name="mine",
        model="org/model",
        num_layers=4,
        num_heads=2,
        heads=(Head(layer=1, head=0, score=0.5, weight=-0.25), Head(layer=3, head=1)),
        template="chatml",
        scoring=ScoringConfig(documents_per_prompt=5, rank_weights={"bm25": 0.5}),
        provenance=Provenance(
            method="fit",
            details={"data": "münchen", "train": ["nq", "sentences"]},
            ranked_heads=((1, 0, 0.5), (3, 1, 0.25)),
        ),
    )
    head_set.save(tmp_path / "mine.json")
    assert HeadSet.load(tmp_path / "mine.json") == head_set


def test_vllm_hook_format(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {
            "model_info": {"model_id": "org/model"},
            "params": {"important_heads": [[15, 21], [9, 26]]},
            "hookq": {"hookq_mode": "all_tokens"},
        },
    )
    head_set = HeadSet.load(path)
    assert head_set.model == "org/model"
    assert pairs(head_set) == [(15, 21), (9, 26)]


def test_core_release_format_takes_the_best_eight(tmp_path: Path) -> None:
    scores = {f"{layer}-1": layer / 100 for layer in range(20)}
    head_set = HeadSet.load(written(tmp_path, scores))
    assert pairs(head_set) == [(layer, 1) for layer in range(19, 11, -1)]
    assert head_set.heads[0].score == 0.19
    assert pairs(head_set.top(3)) == [(19, 1), (18, 1), (17, 1)]
    with pytest.raises(HeadSetError, match="its ranking holds 20"):
        head_set.top(21)


def test_qrhead_format(tmp_path: Path) -> None:
    text = 'attn_head_set: "14-22,13-16" # top\nmodel_name_or_path: "org/model"\n'
    head_set = HeadSet.load(written(tmp_path, text, "qr.yaml"))
    assert (head_set.model, head_set.provenance.method) == ("org/model", "qr")
    assert pairs(head_set) == [(14, 22), (13, 16)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read"),
        ("[]", "an object at its top level"),
        ("{}", "heads: Field required"),
        ({"heads": []}, "at least 1"),
        ({"heads": [{"layer": -1, "head": 0}]}, "greater than or equal to 0"),
        ({"heads": [{"layer": 1, "head": 0}] * 2}, "listed twice"),
        ({"heads": [{"layer": 9, "head": 0}], "num_layers": 9}, "9 layers, numbered from 0"),
        ({"heads": [{"layer": 1, "head": 0}], "wieght": 1}, "wieght"),
        ({"important_heads": [[1]]}, "not a usable head set"),
        ({"attn_head_set": "1-x"}, "not a usable head set"),
        ({"attn_head_set": [1]}, "not a usable head set"),
        ({"important_heads": [[1, 2]], "model_info": "org/model"}, "not a usable head set"),
    ],
)
def test_unusable_files_say_why(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(HeadSetError, match=message) as error:
        HeadSet.load(written(tmp_path, content))
    assert "heads.json" in str(error.value)


WRONG = (
    None,
    True,
    0,
    -1,
    0.5,
    float("inf"),
    float("nan"),
    10**30,
    "x",
    "\ud800",
    [],
    [[]],
    {},
    {"a": 1},
)


def mutations(value: Any, leaves: int = 2) -> Iterator[Any]:
    """Yield a JSON value with each of its parts replaced by each of `WRONG`, dropped or renamed."""
    yield from WRONG
    parts = (
        list(value)
        if isinstance(value, dict)
        else range(min(len(value), leaves))
        if isinstance(value, list)
        else ()
    )
    for part in parts:
        for changed in mutations(value[part]):
            copy = value.copy()
            copy[part] = changed
            yield copy
        copy = value.copy()
        del copy[part]
        yield copy
        if isinstance(value, dict):
            yield {**copy, "other": value[part]}


@pytest.mark.parametrize(
    "content",
    [
        json.loads(
            (resource_folder("model_configs") / "fit-smollm2-135m-instruct.json").read_text()
        ),
        {"model_info": {"model_id": "m"}, "params": {"important_heads": [[1, 2]]}},
        {"attn_head_set": "1-2,3-4", "model_name_or_path": "m"},
        {"1-2": 0.5, "3-4": 1},
        {
            "heads": [{"layer": 1, "head": 2}],
            "adapter": {"path": "a/b", "base_checksums": ["c"], "layers": 2},
        },
    ],
    ids=["own", "vllm-hook", "qrhead", "core", "adapter"],
)
def test_any_value_of_any_type_is_read_or_refused(content: Any, tmp_path: Path) -> None:
    usable, refused = 0, {}
    for changed in mutations(content):
        path = written(tmp_path, json.dumps(changed))
        try:
            head_set = HeadSet.load(path)
        except HeadSetError as error:
            refused[str(error)] = changed
            continue
        usable += 1
        assert np.isfinite([head_set.weights, head_set.evidence_weights]).all()
        for kind in (None, "bm25", "dense", "other"):
            assert np.isfinite(head_set.scoring.prior(99, kind, np.arange(99.0))).all()
        head_set.save(path)
        assert str(HeadSet.load(path)) == str(head_set), "also with NaN, which equals nothing"
    assert all("heads.json" in message for message in refused)
    assert usable > 0
    assert len(refused) > usable


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"heads": [{"layer": True, "head": 0}]}, r"heads\.0\.layer: must be an integer \(True\)"),
        ({"heads": [{"layer": "1", "head": 0}]}, r"heads\.0\.layer: Input should be .* \('1'\)"),
        ({"heads": [{"layer": 1, "head": 0, "weight": "2"}]}, r"heads\.0\.weight: .* \('2'\)"),
        ({"heads": [{"layer": 1, "head": 0, "score": 1e400}]}, r"heads\.0\.score: .* finite"),
        ({"heads": [[1, 0]], "default": "no"}, r"default: .*boolean \('no'\)"),
        ({"important_heads": 5}, r"important_heads: the wrong type, int: 5"),
        ({"important_heads": [[1, "x"]]}, r"heads\.0\.head: .* \('x'\)"),
        ({"attn_head_set": None}, r"attn_head_set: the wrong type, NoneType"),
        ({"1-2": "high"}, r"1-2: the wrong type, str: 'high'"),
        ("[" * 100_000, "cannot read the head set"),
        ("\ufeff{}", "heads: Field required"),
    ],
)
def test_files_of_wrong_types_name_key_and_value(
    tmp_path: Path, content: Any, message: str
) -> None:
    path = written(tmp_path, content)
    with pytest.raises(HeadSetError, match=message) as error:
        HeadSet.load(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 1000, "a long value is shortened"


@pytest.mark.parametrize(
    "text", ["- 1", "heads: [[1, 2]]", "attn_head_set: 2020-01-01", "a: &a [*a]"]
)
def test_yaml_files_are_qrheads(tmp_path: Path, text: str) -> None:
    with pytest.raises(HeadSetError, match=r"heads\.yaml"):
        HeadSet.load(written(tmp_path, text, "heads.yaml"))


def test_missing_file() -> None:
    with pytest.raises(HeadSetError, match=r"cannot read the head set nowhere\.json"):
        HeadSet.load("nowhere.json")
    with pytest.raises(HeadSetError, match="neither a head set file nor a shipped head set"):
        named_head_set("nowhere")
    for path in ("long" * 1000, "nul\0", "/"):
        with pytest.raises(HeadSetError, match="head set"):
            named_head_set(path)


@pytest.mark.parametrize("wrong", [[(1,)], [3], [("a", 1)], [(1, -1)], [(1, 2), (1, 2)], []])
def test_plain_lists_are_checked(wrong: Any) -> None:
    with pytest.raises(HeadSetError):
        HeadSet.from_pairs(wrong)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layers": 32}, "for a model of 32 layers"),
        ({"num_heads": 32}, "for a model of 32 heads per layer"),
        ({"model_type": "mistral"}, "of type 'mistral'"),
        ({"model": "org/other"}, "found on org/other, but the model is org/model"),
        ({"heads": (Head(layer=30, head=0),)}, "30 layers, numbered from 0"),
        ({"heads": (Head(layer=29, head=9),)}, "has 9 heads, numbered from 0"),
    ],
)
def test_a_set_of_another_model_is_refused(fields: dict[str, Any], message: str) -> None:
    head_set = HeadSet(**{"heads": (Head(layer=1, head=1),), **fields})
    with pytest.raises(HeadSetError, match=message):
        head_set.check("org/model", SMOLLM2)


def test_a_matching_set_is_accepted_by_hub_id_alias_or_folder() -> None:
    head_set = default_head_set("meta-llama/Meta-Llama-3.1-8B-Instruct")
    assert head_set.provenance.method == "core"
    shape = ModelShape(32, 32, "llama")
    for model in (head_set.model, head_set.model_aliases[0], None):
        head_set.check(model, shape)


def test_shipped_sets_are_complete() -> None:
    sets = shipped_head_sets()
    assert len(sets) == len(list(resource_folder("model_configs").glob("*.json"))) > 0
    for name, head_set in sets.items():
        assert name == head_set.name
        assert head_set.model
        assert head_set.template in TEMPLATES
        assert head_set.provenance.details["source"]
        assert len(head_set.heads) >= 2
        assert head_set.num_layers
        assert head_set.num_heads
        if ranked_heads := head_set.provenance.ranked_heads:
            ranked = [(layer, head) for layer, head, _ in ranked_heads]
            assert pairs(head_set) == ranked[: len(head_set.heads)]


def test_an_adapter_comes_first_where_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = Adapter(path="tuned", base_checksums=("0" * 64,), layers=2)
    sets = {
        name: HeadSet(name=name, model="org/new", heads=(Head(layer=1, head=1),), **fields)
        for name, fields in {
            "a": {},
            "b": {"default": True},
            "c": {"adapter": adapter},
            "d": {"default": True, "adapter": adapter},
        }.items()
    }
    monkeypatch.setattr(shipped, "shipped_head_sets", lambda: sets)
    assert default_head_set("org/new").name == "d"
    assert default_head_set("org/new", allows_adapter=False).name == "b"
    assert head_set_for("d", "org/new", allows_adapter=False).name == "d"
    del sets["d"]
    assert default_head_set("org/new").name == "b"
    del sets["b"]
    assert default_head_set("org/new").name == "a"
    del sets["a"]
    assert default_head_set("org/new", allows_adapter=False).name == "c"


def test_no_shipped_set_names_the_remedy() -> None:
    with pytest.raises(HeadSetError, match=r"no head set is shipped for org/new; pass heads="):
        default_head_set("org/new")


def test_probabilities_of_a_calibration() -> None:
    calibration = Calibration(slope=2.0, intercept=-1.0)
    scores = np.array([0.5, -1e9, 1e9, 1.0])
    expected = [0.5, 0.0, 1.0, 1 / (1 + np.exp(-1))]
    assert calibration.probabilities(scores) == pytest.approx(expected)


def test_a_calibration_requires_one_document_per_prompt() -> None:
    calibration = {"slope": 2.0, "intercept": -1.0}
    assert HeadSet.from_pairs(
        [(1, 1)], scoring={"documents_per_prompt": 1, "calibration": calibration}
    )
    with pytest.raises(
        HeadSetError, match="requires documents_per_prompt=1, got documents_per_prompt=5"
    ):
        HeadSet.from_pairs(
            [(1, 1)], scoring={"documents_per_prompt": 5, "calibration": calibration}
        )
    with pytest.raises(HeadSetError, match=r"scoring\.calibration\.slope"):
        HeadSet.from_pairs(
            [(1, 1)],
            scoring={"documents_per_prompt": 1, "calibration": {**calibration, "slope": -1.0}},
        )


def test_a_calibration_belongs_to_a_number_of_documents() -> None:
    alone = HeadSet.from_pairs(
        [(1, 1)],
        scoring={"documents_per_prompt": 1, "calibration": {"slope": 2.0, "intercept": -1.0}},
    )
    assert alone.with_documents_per_prompt(1) == alone
    together = alone.with_documents_per_prompt(5)
    assert (together.scoring.documents_per_prompt, together.scoring.calibration) == (5, None)


def with_adapter(path: str | Path, **fields: Any) -> HeadSet:
    adapter = Adapter(path=str(path), base_checksums=("ab",), layers=4)
    return HeadSet.from_pairs([(1, 0), (3, 2)], adapter=adapter, **fields)


@pytest.mark.parametrize(
    ("path", "written_as"),
    [
        ("adapter", "adapter"),
        ("deep/er/adapter", "deep/er/adapter"),
        ("two/parts", "two/parts"),
        (".", "."),
        ("../outside", None),
    ],
)
def test_the_folder_of_an_adapter_moves_with_its_file(
    path: str, written_as: str | None, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    folder = (home / path).resolve()
    folder.mkdir(parents=True)
    with_adapter(folder).save(home / "heads.json")
    written = json.loads((home / "heads.json").read_text())["adapter"]["path"]
    assert written == (written_as or str(folder))
    assert HeadSet.load(home / "heads.json") == with_adapter(folder)
    home.rename(tmp_path / "moved")
    moved = tmp_path / "moved" / path if written_as else folder
    loaded = HeadSet.load(tmp_path / "moved" / "heads.json").adapter
    assert loaded is not None
    assert loaded.path == str(moved)


def test_a_relative_folder_is_that_of_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with_adapter("adapter").save("elsewhere/heads.json")
    assert HeadSet.load("elsewhere/heads.json") == with_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("path", ["owner/name", "owner/name@v1.0", "~/adapter"])
def test_other_names_of_adapters_stay_as_they_are(path: str, tmp_path: Path) -> None:
    head_set = with_adapter(path, name="tuned")
    head_set.save(tmp_path / "heads.json")
    assert HeadSet.load(tmp_path / "heads.json") == head_set


def test_heads_above_the_layers_of_an_adapter_are_refused() -> None:
    message = "a head of layer 4 is out of range: the adapter keeps 4 layers"
    adapter = with_adapter("adapter").adapter
    with pytest.raises(HeadSetError, match=message):
        HeadSet.from_pairs([(4, 0)], adapter=adapter)
    ranking = Provenance(ranked_heads=((0, 1, 2.0), (4, 0, 1.0)))
    ranked = with_adapter("adapter", provenance=ranking, name="tuned")
    top = ranked.top(1)
    assert (pairs(top), top.name, top.adapter) == ([(0, 1)], "tuned-top1", adapter)
    with pytest.raises(HeadSetError, match=message):
        ranked.top(2)
    with pytest.raises(HeadSetError, match="the adapter keeps 4 layers, but the model has 3"):
        HeadSet.from_pairs([(1, 0)], adapter=adapter, num_layers=3)
    with pytest.raises(HeadSetError, match="the adapter keeps 4 layers, but the model has 3"):
        HeadSet.from_pairs([(1, 0)], adapter=adapter).check(None, ModelShape(3, 9, "llama"))
