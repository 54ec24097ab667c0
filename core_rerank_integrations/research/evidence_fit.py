"""Evidence weights, which separate the sentence with the answer from the rest of its document."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from core_rerank_integrations._internal.progress import Progress, no_progress, progress_bar
from core_rerank_integrations.backends.loading import chosen_backend
from core_rerank_integrations.errors import InvalidInputError, requires_extra
from core_rerank_integrations.heads.head_set import HeadSet
from core_rerank_integrations.heads.shipped import head_set_for
from core_rerank_integrations.method.evidence import TokenScores, character_scores, sentences, sums
from core_rerank_integrations.method.windows import Candidates
from core_rerank_integrations.models.local_model import model_shape
from core_rerank_integrations.models.resolve import resolve
from core_rerank_integrations.research.collection import Collection, has_contrast
from core_rerank_integrations.research.options import EvidenceOptions
from core_rerank_integrations.research.weights import Array, ListwiseLoss
from core_rerank_integrations.scorer import AttentionScorer, load_scorer
from core_rerank_integrations.settings import RerankerSettings

with requires_extra("eval"):
    from scipy.optimize import minimize

L2_STRENGTH = 0.01
"""Strength of the penalty on squared weights, for features of unit deviation; chosen by four folds
of NQ train."""
MIN_SENTENCES = 3


class AnsweredDocument(NamedTuple):
    """A question and a document that answers it in some of its sentences.

    Attributes:
        query: Text of the question.
        document: Text of the document.
        sentences: Start and stop of each sentence, in characters of the document.
        answers: Whether each sentence contains an answer, boolean, shape [sentences].
    """

    query: str
    document: str
    sentences: list[tuple[int, int]]
    answers: npt.NDArray[np.bool_]


def answered_documents(
    folder: Path, split: str, questions: int | None = None, seed: int = 0
) -> list[AnsweredDocument]:
    """Return relevant documents of a collection whose questions come with answers.

    Documents of fewer than three sentences are left out, and those in which no sentence or every
    sentence contains an answer.

    Args:
        folder: Folder in the layout of BEIR; ``queries.jsonl`` has ``answers``, a list of strings.
        split: Name of the judgments.
        questions: Number of relevant documents to draw first; ``None`` for all.
        seed: Seed of the sample.

    Raises:
        InvalidInputError: A file cannot be read, or no document is left, for example because no
            question has answers.
    """
    collection = Collection.load(folder, split)
    pairs = [
        (query, name)
        for query, grades in collection.qrels.items()
        for name, grade in grades.items()
        if grade > 0 and collection.answers.get(query)
    ]
    random.Random(seed).shuffle(pairs)
    documents = []
    for query, name in islice(pairs, questions):
        text = collection.passages[name].content
        borders = sentences(text)
        answers = [collection.has_answer(query, text[start:stop]) for start, stop in borders]
        if len(borders) >= MIN_SENTENCES and has_contrast(answers):
            documents.append(
                AnsweredDocument(collection.queries[query], text, borders, np.array(answers))
            )
    if not documents:
        raise InvalidInputError(
            f"{folder}, {split}: no relevant document has an answer in some of its sentences; "
            "queries.jsonl needs 'answers', a list of strings"
        )
    return documents


def sentence_features(
    scorer: AttentionScorer,
    heads: HeadSet,
    documents: Sequence[AnsweredDocument],
    progress: Progress = no_progress,
) -> list[Array]:
    """Compute the calibrated mass of each head on each sentence.

    Args:
        scorer: A scorer that runs ``heads``.
        heads: The heads.
        documents: The documents; each is read in a prompt of its own.
        progress: Wraps the prompts.

    Returns:
        One array per document, shape [sentences, heads].
    """
    layout = heads.with_documents_per_prompt(1).scoring.layout()
    planned = scorer.plan([Candidates(item.query, (item.document,)) for item in documents], layout)
    owners = [number for number, windows in enumerate(planned) for _ in windows]
    windows = [window for windows in planned for window in windows]
    passages: list[list[TokenScores]] = [[] for _ in documents]
    for index, attention in progress(scorer.stream(windows), len(windows)):
        passages[owners[index]] += (tokens.shifted() for tokens in attention.token_scores())
    return [
        sums(character_scores(item.document, tokens), item.sentences).T
        for item, tokens in zip(documents, passages, strict=True)
    ]


def fit_evidence_weights(features: Sequence[Array], documents: Sequence[AnsweredDocument]) -> Array:
    """Fit weights that give the highest scores to the sentences with an answer.

    The loss of a document is the cross-entropy between its sentences with an answer and the
    softmax of the scores of all its sentences. The penalty is on the squares of the weights.

    Args:
        features: Features of the sentences; see `sentence_features`.
        documents: The documents of the features.

    Returns:
        Shape [heads].
    """
    deviation = np.concatenate(features).std(axis=0)
    scale = np.where(deviation > 0, deviation, 1.0)
    loss = ListwiseLoss([item / scale for item in features], [item.answers for item in documents])

    def objective(weights: Array) -> tuple[float, Array]:
        value, gradient = loss.value_and_gradient(weights)
        penalty = L2_STRENGTH * float(weights @ weights)
        return value + penalty, gradient + 2 * L2_STRENGTH * weights

    solution = minimize(objective, np.zeros(len(scale)), jac=True, method="L-BFGS-B")
    weights: Array = solution.x / scale
    return weights


def fit_evidence(options: EvidenceOptions, *, show_progress: bool = False) -> HeadSet:
    """Add evidence weights to a head set, by which `CoReReranker.rerank` scores sentences.

    Args:
        options: The head set, the model and the data.
        show_progress: Whether to show a progress bar on standard error.

    Returns:
        The head set; its ranking does not change.

    Raises:
        InvalidInputError: The collection cannot be read or has no answers, or options of the
            runtime do not belong together.
        HeadSetError: There is no such head set, or it belongs to another model.
        ModelError: The model cannot be found, downloaded, or read exactly.
    """
    documents = answered_documents(options.data, options.split, options.questions, options.seed)
    model = resolve(options.model)
    heads = head_set_for(options.heads, model.model_id)
    heads.check(model.model_id, model_shape(model.config()))
    settings = RerankerSettings.checked(**options.runtime)
    scorer = load_scorer(chosen_backend(settings, model, heads), settings, model, heads)
    try:
        progress = progress_bar(show_progress, "Reading")
        features = sentence_features(scorer, heads, documents, progress)
    finally:
        scorer.close()
    fitted = tuple(
        head.model_copy(update={"evidence_weight": float(f"{weight:.6g}")})
        for head, weight in zip(heads.heads, fit_evidence_weights(features, documents), strict=True)
    )
    details = {
        **heads.provenance.details,
        "evidence": f"{options.data.name}, {options.split}, {len(documents)} documents",
    }
    provenance = heads.provenance.model_copy(update={"details": details})
    return heads.model_copy(update={"heads": fitted, "provenance": provenance})
