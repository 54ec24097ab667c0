"""Weights by which heads tell the sentence with the answer from the others of its document."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from core_rerank_integrations._internal.progress import tracked
from core_rerank_integrations.backends.loading import load_scorer
from core_rerank_integrations.errors import InvalidInputError, requires_extra
from core_rerank_integrations.heads.head_set import HeadSet
from core_rerank_integrations.method.evidence import (
    TokenScores,
    character_scores,
    sentences,
    sums,
)
from core_rerank_integrations.models.resolve import DEFAULT_MODEL, model_shape, resolve
from core_rerank_integrations.research.collection import Collection
from core_rerank_integrations.scorer import (
    AttentionScorer,
    Candidates,
    Progress,
    layout_of,
    no_progress,
)

with requires_extra("eval"):
    from scipy.optimize import minimize
    from scipy.special import logsumexp

Array = npt.NDArray[np.float64]

STRENGTH = 0.01
"""Of the penalty on squared weights, in features of unit deviation; by four folds of NQ train."""


class AnsweredDocument(NamedTuple):
    """A question, a document that answers it, and where.

    Attributes:
        query: The question.
        document: Its text.
        sentences: Where the document's sentences begin and end.
        answers: Which of them hold an answer, boolean, shape [sentences]; some, not all.
    """

    query: str
    document: str
    sentences: list[tuple[int, int]]
    answers: npt.NDArray[np.bool_]


def answers_of(folder: Path) -> dict[str, list[str]]:
    """By query id, the answers of a collection's ``queries.jsonl``; none where it has none."""
    with (folder / "queries.jsonl").open(encoding="utf-8") as lines:
        return {record["_id"]: record.get("answers", []) for record in map(json.loads, lines)}


def holds_any(answers: Sequence[str], text: str) -> bool:
    """Whether one of the answers stands in ``text``, in capitals or not."""
    return any(answer.casefold() in text.casefold() for answer in answers)


def answered_documents(
    folder: str | Path, split: str, questions: int | None = None, seed: int = 0
) -> list[AnsweredDocument]:
    """Relevant documents of a collection whose questions come with answers.

    Left out are documents of fewer than three sentences, and those in which no sentence holds an
    answer, or every one.

    Args:
        folder: In the layout of BEIR; ``queries.jsonl`` has ``answers``, a list of strings.
        split: Which judgments.
        questions: How many relevant documents to draw first; ``None`` for all.
        seed: Seed of the drawing.

    Raises:
        InvalidInputError: A file cannot be read, questions have no answers, or none is left.
    """
    folder = Path(folder)
    collection = Collection.load(folder, split)
    answers = answers_of(folder)
    pairs = [
        (query, document)
        for query, grades in collection.qrels.items()
        for document, grade in grades.items()
        if grade > 0 and answers[query]
    ]
    random.Random(seed).shuffle(pairs)
    found = []
    for query, name in islice(pairs, questions):
        text = collection.passages[name].content
        borders = sentences(text)
        hits = np.array([holds_any(answers[query], text[start:stop]) for start, stop in borders])
        if len(borders) >= 3 and hits.any() and not hits.all():
            found.append(AnsweredDocument(collection.queries[query], text, borders, hits))
    if not found:
        raise InvalidInputError(
            f"{folder}, {split}: no relevant document has an answer in some of its sentences; "
            "queries.jsonl needs 'answers', a list of strings"
        )
    return found


def sentence_features(
    reader: AttentionScorer,
    heads: HeadSet,
    documents: Sequence[AnsweredDocument],
    tracked: Progress = no_progress,
) -> list[Array]:
    """What each head gives to each sentence: of each document, shape [sentences, heads].

    Args:
        reader: Reads ``heads``.
        heads: How they want documents to be read.
        documents: Each is read by itself.
        tracked: Wraps the prompts as they are read; a progress bar, say.
    """
    layout = layout_of(heads.with_documents_per_prompt(1))
    planned = reader.plan([Candidates(item.query, (item.document,)) for item in documents], layout)
    prompts = [window for windows in planned for window in windows]
    owners = [number for number, windows in enumerate(planned) for _ in windows]
    passages: list[list[TokenScores]] = [[] for _ in documents]
    for place, reading in tracked(reader.stream(prompts, by_head=True), len(prompts)):
        passages[owners[place]] += (tokens.gathered() for tokens in reading.token_scores())
    return [
        sums(character_scores(item.document, read), item.sentences).T
        for item, read in zip(documents, passages, strict=True)
    ]


def fit_evidence_weights(
    features: Sequence[Array], documents: Sequence[AnsweredDocument], strength: float = STRENGTH
) -> Array:
    """Weights by which the sentences that hold an answer are given most, shape [heads].

    The loss of a document is the cross-entropy between its sentences with an answer and the softmax
    of all its sentences' scores; the penalty is on the squares of the weights.

    Args:
        features: See `sentence_features`.
        documents: What they are of.
        strength: Of the penalty.

    Raises:
        InvalidInputError: ``strength`` is negative.
    """
    if strength < 0:
        raise InvalidInputError(f"strength must not be negative, got {strength}")
    deviation = np.concatenate(list(features)).std(axis=0)
    scale = np.where(deviation > 0, deviation, 1.0)
    lists = [
        (of_document / scale, item.answers / item.answers.sum())
        for of_document, item in zip(features, documents, strict=True)
    ]

    def loss(weights: Array) -> tuple[float, Array]:
        total, gradient = 0.0, np.zeros_like(weights)
        for of_document, target in lists:
            logits = of_document @ weights
            log_shares = logits - logsumexp(logits)
            total -= float(target @ log_shares)
            gradient += of_document.T @ (np.exp(log_shares) - target)
        return (
            total / len(lists) + strength * float(weights @ weights),
            gradient / len(lists) + 2 * strength * weights,
        )

    weights: Array = minimize(loss, np.zeros(len(scale)), jac=True, method="L-BFGS-B").x / scale
    return weights


def sentence_hits(
    scores: Sequence[npt.ArrayLike], documents: Sequence[AnsweredDocument], best: int = 1
) -> float:
    """How often one of the ``best`` sentences by score holds an answer; of equals, the earlier."""
    hits = [
        item.answers[np.argsort(-np.asarray(of_document), kind="stable")[:best]].any()
        for of_document, item in zip(scores, documents, strict=True)
    ]
    return float(np.mean(hits))


def fit_evidence(
    heads: HeadSet,
    folder: str | Path,
    split: str,
    questions: int | None = None,
    model: str | Path = DEFAULT_MODEL,
    *,
    seed: int = 0,
    backend: str = "auto",
    dtype: str = "auto",
    show_progress: bool = False,
) -> HeadSet:
    """A head set with evidence weights, by which `CoReReranker.rerank` finds the best sentences.

    Args:
        heads: The head set; how it ranks stays as it is.
        folder: A collection whose questions come with answers; see `answered_documents`.
        split: Which judgments.
        questions: How many relevant documents to draw; ``None`` for all.
        model: The model of the heads.
        seed: Seed of the drawing.
        backend: As for `CoReReranker`.
        dtype: As for `CoReReranker`.
        show_progress: Whether a bar on standard error says how far this is.

    Raises:
        InvalidInputError: The collection cannot be read, or has no answers.
        HeadSetError: The heads are not this model's.
    """
    documents = answered_documents(folder, split, questions, seed)
    local_model = resolve(model)
    heads.check(local_model.model_id, model_shape(local_model.config()))
    shown = partial(tracked, what="Reading") if show_progress else no_progress
    reader = load_scorer(backend, local_model, heads, dtype)
    try:
        features = sentence_features(reader, heads, documents, shown)
    finally:
        reader.close()
    weights = fit_evidence_weights(features, documents)
    fitted = tuple(
        head.model_copy(update={"evidence": float(f"{weight:.6g}")})
        for head, weight in zip(heads.heads, weights, strict=True)
    )
    details = {
        **heads.provenance.details,
        "evidence": f"{Path(folder).name}, {split}, {len(documents)} documents",
    }
    provenance = heads.provenance.model_copy(update={"details": details})
    return heads.model_copy(update={"heads": fitted, "provenance": provenance})
