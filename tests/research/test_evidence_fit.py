"""Weights by which heads tell sentences apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.head_sets import HEADS
from test_cli import failed, run

from core_rerank_integrations import HeadSet
from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.research.fit_evidence import (
    AnsweredDocument,
    answered_documents,
    fit_evidence_weights,
    sentence_hits,
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
    """A collection with answers, two of whose documents can be used."""
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
    found = {item.document: item for item in answered_documents(folder, "train")}
    assert set(found) == {TEXTS["bell"], TEXTS["lens"]}
    assert found[TEXTS["bell"]].answers.tolist() == [False, True, False]
    assert found[TEXTS["lens"]].answers.tolist() == [False, True, False, False]
    assert len(answered_documents(folder, "train", questions=4)) == 2
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": name, "text": "?"}) + "\n" for name in TEXTS)
    )
    with pytest.raises(InvalidInputError, match="needs 'answers', a list of strings"):
        answered_documents(folder, "train")


def documents(count: int, seed: int) -> tuple[list[np.ndarray], list[AnsweredDocument]]:
    """The second head knows the sentence with the answer, the third avoids it."""
    draw = np.random.default_rng(seed)
    features, found = [], []
    for _ in range(count):
        answers = np.arange(5) == draw.integers(5)
        of_document = draw.normal(0, 0.01, (5, 4))
        of_document[:, 1] += 0.02 * answers
        of_document[:, 2] -= 0.02 * answers
        features.append(of_document)
        found.append(AnsweredDocument("?", "", [(0, 0)] * 5, answers))
    return features, found


def test_weights_find_what_knows_the_answer() -> None:
    weights = fit_evidence_weights(*documents(200, seed=0))
    assert weights[1] > 3 * abs(weights[0])
    assert weights[2] < -3 * abs(weights[3])
    features, found = documents(100, seed=1)
    scores = [of_document @ weights for of_document in features]
    assert sentence_hits(scores, found) > 0.8
    assert sentence_hits(scores, found, best=5) == 1
    assert sentence_hits([-of_document for of_document in scores], found) < 0.1
    with pytest.raises(InvalidInputError, match="must not be negative, got -1"):
        fit_evidence_weights(features, found, strength=-1)


def test_a_head_set_gets_weights_and_ranks_as_before(folder: Path) -> None:
    HEADS.save(folder / "four.json")
    command = (
        "heads", "evidence", "--heads", str(folder / "four.json"), "--model", "smollm2-135m",
        "--data", str(folder), "--output", str(folder / "told.json"),
    )  # fmt: skip
    assert "Wrote" in run(*command)
    told = HeadSet.load(folder / "told.json")
    assert told.scoring == HEADS.scoring
    assert told.weights.tolist() == HEADS.weights.tolist()
    assert all(head.evidence is not None for head in told.heads)
    assert "train, 2 documents" in str(told.provenance.details["evidence"])
    assert "cannot read" in failed(*command, "--split", "dev")
