"""Detection of a model's retrieval heads: SCoRe and QR scores of all heads (arXiv 2510.02219)."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from core_rerank_integrations._internal.files import write_atomically
from core_rerank_integrations._internal.progress import progress_bar
from core_rerank_integrations.errors import InvalidInputError, requires_extra
from core_rerank_integrations.heads.head_set import Head, HeadSet
from core_rerank_integrations.heads.scoring_config import ScoringConfig
from core_rerank_integrations.method.windows import Candidates, Layout
from core_rerank_integrations.research.collection import Collection
from core_rerank_integrations.research.features import HeadFeatures, HeadReader
from core_rerank_integrations.research.options import Detection, FindOptions

with requires_extra("eval"):
    from scipy.special import softmax

Array = npt.NDArray[np.float64]


class Case(NamedTuple):
    """A prompt for the detection.

    Attributes:
        candidates: A question, one relevant document and hard negatives.
        positive: Index of the relevant document.
    """

    candidates: Candidates
    positive: int


def detection_cases(
    collection: Collection,
    run: Mapping[str, Sequence[str]],
    questions: int | None,
    options: FindOptions,
) -> list[Case]:
    """Create prompts with one relevant document each, at positions spread over the list.

    The negatives are the first stage's best that are not judged relevant, in its order. The
    relevant document has the best grade; of several, it is the one that the first stage ranks
    first.

    Args:
        collection: Documents, queries and judgments.
        run: Document ids per query id, best first.
        questions: Number of questions, drawn from those with a relevant document and enough
            negatives; ``None`` for all.
        options: ``negatives``, ``positions`` and ``seed``. The seed also decides where a relevant
            document is first.

    Raises:
        InvalidInputError: Too few questions have enough negatives, or there are more positions
            than documents in a list.
    """
    length = options.negatives + 1
    if options.positions > length:
        raise InvalidInputError(
            f"{options.positions} positions are more than a list of {length} documents has"
        )
    generator = random.Random(options.seed)
    shuffled = sorted(collection.queries)
    generator.shuffle(shuffled)
    cases: list[Case] = []
    used = 0
    for question in shuffled:
        first = generator.randrange(length)
        chosen = _choose(collection, question, run.get(question, ()), options.negatives)
        if chosen is None:
            continue
        relevant, negatives = chosen
        for number in range(options.positions):
            positive = (first + number * length // options.positions) % length
            documents = [*negatives[:positive], relevant, *negatives[positive:]]
            cases.append(Case(collection.candidates(question, documents), positive))
        used += 1
        if used == questions:
            break
    if used == 0 or (questions is not None and used < questions):
        raise InvalidInputError(
            f"{used} of {len(shuffled)} questions have a relevant document and "
            f"{options.negatives} candidates that are not, {questions or 'at least one'} were "
            "asked for; lower --questions or --negatives, or give a run of more candidates"
        )
    return cases


def _choose(
    collection: Collection, question: str, candidates: Sequence[str], count: int
) -> tuple[str, list[str]] | None:
    """Return the ids of the relevant document and its negatives, or ``None`` if too few."""
    grades = collection.qrels[question]
    best = max(grades.values())
    negatives = [name for name in candidates if grades.get(name, 0) <= 0][:count]
    if best <= 0 or len(negatives) < count:
        return None
    ranks = {name: rank for rank, name in enumerate(candidates)}
    relevant = [name for name, grade in grades.items() if grade == best]
    return min(relevant, key=lambda name: (ranks.get(name, len(ranks)), name)), negatives


@dataclass(frozen=True)
class HeadScores:
    """Scores of all heads, each a mean over prompts.

    Attributes:
        heads: (layer, head) of each score.
        prompts: Number of prompts.
        core: SCoRe by temperature, shape [heads]: the softmax over documents of the attention
            mass divided by the temperature, at the relevant document.
        core_error: Standard error of each SCoRe, by temperature, shape [heads].
        qr: Calibrated score of the relevant document, shape [heads].
    """

    heads: tuple[tuple[int, int], ...]
    prompts: int
    core: Mapping[float, Array]
    core_error: Mapping[float, Array]
    qr: Array

    def ranking(self, method: Detection) -> list[tuple[int, int, float]]:
        """Return (layer, head, score), best first; ties keep the order of layers and heads.

        Args:
            method: ``qr``, or ``core`` at the first temperature.
        """
        scores = self.qr if method == "qr" else next(iter(self.core.values()))
        ranked = [
            (layer, head, float(score))
            for (layer, head), score in zip(self.heads, scores, strict=True)
        ]
        return sorted(ranked, key=lambda item: -item[2])

    def save(self, path: Path) -> None:
        """Write all scores as JSON: per method and temperature, ``{"layer-head": score}``.

        Raises:
            StorageError: The file cannot be written.
        """

        def named(scores: Array) -> dict[str, float]:
            return {
                f"{layer}-{head}": round(float(score), 9)
                for (layer, head), score in zip(self.heads, scores, strict=True)
            }

        content = {
            "prompts": self.prompts,
            "core": {str(key): named(scores) for key, scores in self.core.items()},
            "core_standard_error": {
                str(key): named(scores) for key, scores in self.core_error.items()
            },
            "qr": named(self.qr),
        }
        write_atomically(path, json.dumps(content, indent=1) + "\n")


def score_heads(
    read: Callable[[Candidates, Layout], HeadFeatures],
    heads: Sequence[Head],
    cases: Iterable[Case],
    temperatures: Sequence[float],
) -> HeadScores:
    """Score every head on every case, at all temperatures in one pass over the data.

    Args:
        read: Computes the features of a list; see `HeadReader.read`.
        heads: The heads of the features, in order.
        cases: The prompts; they are read one by one.
        temperatures: Temperatures of SCoRe's softmax.

    Raises:
        InvalidInputError: There are no cases.
    """
    count = 0
    core = np.zeros((2, len(temperatures), len(heads)))
    qr = np.zeros(len(heads))
    for case in cases:
        features = read(case.candidates, Layout())
        attention = features.attention.astype(np.float64)
        for row, temperature in enumerate(temperatures):
            score = softmax(attention / temperature, axis=0)[case.positive]
            core[:, row] += score, score**2
        qr += features.scores[case.positive]
        count += 1
    if not count:
        raise InvalidInputError("there are no questions to find heads on")
    mean, square = core / count
    error = np.sqrt(np.maximum(square - mean**2, 0) / count)
    return HeadScores(
        tuple((head.layer, head.head) for head in heads),
        count,
        dict(zip(temperatures, mean, strict=True)),
        dict(zip(temperatures, error, strict=True)),
        qr / count,
    )


class FoundHeads(NamedTuple):
    """Result of `find_heads`.

    Attributes:
        head_set: The best heads.
        scores: Scores of all heads.
    """

    head_set: HeadSet
    scores: HeadScores


def find_heads(options: FindOptions, *, show_progress: bool = False) -> FoundHeads:
    """Score every head on judged questions, and select the best.

    What the model computes is stored, so that an interrupted run continues; see `HeadReader`.

    Args:
        options: The model, the data and the method.
        show_progress: Whether to show a progress bar on standard error.

    Raises:
        InvalidInputError: A file cannot be read, or too few questions have enough negatives.
        HeadSetError: The model has no layer ``max_layer``.
        ModelError: The model cannot be found, downloaded, or read exactly.
        StorageError: Features cannot be written or read back.
    """
    cases = []
    for source in options.data:
        collection, scored = source.load()
        run = {query: [name for name, _ in ranking] for query, ranking in scored.items()}
        cases += detection_cases(collection, run, source.questions or options.questions, options)
    with HeadReader(options) as reader:
        progress = progress_bar(show_progress, "Finding heads")
        scores = score_heads(
            reader.read, reader.heads.heads, progress(cases, len(cases)), options.temperature
        )
    ranking = scores.ranking(options.method)
    head_set = reader.head_set(
        options.name or "found",
        HeadSet.from_ranking(ranking, options.num_heads).heads,
        ScoringConfig(
            documents_per_prompt=options.documents_per_prompt, best_last=options.best_last
        ),
        options.method,
        {
            "source": "core-rerank heads find",
            "data": [source.folder.name for source in options.data],
            "split": [source.split for source in options.data],
            "run": [source.run.name for source in options.data],
            "questions": len(cases) // options.positions,
            "negatives": options.negatives,
            "positions": options.positions,
            "prompts": scores.prompts,
            **({"temperature": options.temperature[0]} if options.method == "core" else {}),
            "seed": options.seed,
        },
        ranking,
    )
    return FoundHeads(head_set, scores)
