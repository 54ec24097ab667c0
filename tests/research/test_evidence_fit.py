"""Weights by which heads tell sentences apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.cli import failed, run
from support.head_sets import HEADS

from core_rerank_integrations import HeadSet
from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.research.evidence_fit import (
    AnsweredDocument,
    answered_documents,
    fit_evidence_weights,
)

TEXTS = {
    "bell": "Bread is baked. Bell patented the telephone in 1876. Gulls fly.",
    "lens": "The lens is of glass. It came from Paris in 1859. Oil is gone. Tides turn.",
    "bare": "Nothing of the kind stands here. Nor here. Nor there.",
    "short": "Bell did it. Edison did not.",
}
ANSWERS = {"bell": ["1876"], "lens": ["PARIS"], "bare": ["Rome"], "short": ["Bell"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a collection with answers, two of whose documents can be used."""
    (tmp_path / "qrels").mkdir()
    for name, rows in (
        ("corpus", [{"_id": name, "text": text} for name, text in TEXTS.items()]),
        (
            "queries",
            [
                {"_id": name, "text": f"When was the {name} made?", "answers": answers}
                for name, answers in ANSWERS.items()
            ],
        ),
    ):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    rows = "".join(f"{name}\t{name}\t1\n" for name in TEXTS)
    (tmp_path / "qrels/train.tsv").write_text(f"query-id\tcorpus-id\tscore\n{rows}")
    return tmp_path


def test_documents_that_answer_in_some_of_their_sentences(folder: Path) -> None:
    by_text = {item.document: item for item in answered_documents(folder, "train")}
    assert set(by_text) == {TEXTS["bell"], TEXTS["lens"]}
    assert by_text[TEXTS["bell"]].answers.tolist() == [False, True, False]
    assert by_text[TEXTS["lens"]].answers.tolist() == [False, True, False, False]
    assert len(answered_documents(folder, "train", questions=4)) == 2
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": name, "text": "?"}) + "\n" for name in TEXTS)
    )
    with pytest.raises(InvalidInputError, match="needs 'answers', a list of strings"):
        answered_documents(folder, "train")


def documents(count: int, seed: int) -> tuple[list[np.ndarray], list[AnsweredDocument]]:
    """Return documents whose sentence with the answer is high in head 1 and low in head 2."""
    draw = np.random.default_rng(seed)
    features, answered = [], []
    for _ in range(count):
        answers = np.arange(5) == draw.integers(5)
        mass = draw.normal(0, 0.01, (5, 4))
        mass[:, 1] += 0.02 * answers
        mass[:, 2] -= 0.02 * answers
        features.append(mass)
        answered.append(AnsweredDocument("?", "", [(0, 0)] * 5, answers))
    return features, answered


def test_weights_find_what_knows_the_answer() -> None:
    weights = fit_evidence_weights(*documents(200, seed=0))
    assert weights[1] > 3 * abs(weights[0])
    assert weights[2] < -3 * abs(weights[3])
    features, answered = documents(100, seed=1)
    scores = [mass @ weights for mass in features]
    pairs = list(zip(scores, answered, strict=True))
    assert np.mean([item.answers[values.argmax()] for values, item in pairs]) > 0.8
    assert np.mean([item.answers[values.argmin()] for values, item in pairs]) < 0.1


@pytest.mark.model
def test_a_head_set_gets_weights_and_ranks_as_before(folder: Path) -> None:
    HEADS.save(folder / "four.json")
    command = (
        "heads", "evidence", "--heads", str(folder / "four.json"), "--model", "smollm2-135m",
        "--data", str(folder), "--output", str(folder / "evidence.json"),
    )  # fmt: skip
    assert "Wrote" in run(*command)
    fitted = HeadSet.load(folder / "evidence.json")
    assert fitted.scoring == HEADS.scoring
    assert fitted.weights.tolist() == HEADS.weights.tolist()
    assert all(head.evidence_weight is not None for head in fitted.heads)
    assert "train, 2 documents" in str(fitted.provenance.details["evidence"])
    assert "cannot read" in failed(*command, "--split", "dev")
    wrong = failed(*command, "--backend", "vllm", "--device", "cpu")
    assert "device='cpu' is not for 'vllm'" in wrong
