"""Finding a model's retrieval heads: SCoRe and QR scores of all its heads (arXiv 2510.02219)."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from core_rerank_integrations._internal.files import write_atomically
from core_rerank_integrations._internal.progress import tracked
from core_rerank_integrations.errors import InvalidInputError, requires_extra
from core_rerank_integrations.heads.head_set import PUBLISHED_CORE_HEADS, Head, HeadSet
from core_rerank_integrations.heads.scoring_config import ScoringConfig
from core_rerank_integrations.research.collection import Collection, load_run
from core_rerank_integrations.research.features import HeadFeatures, HeadReader
from core_rerank_integrations.research.sources import JudgedRun

with requires_extra("eval"):
    from scipy.special import softmax

DEFAULT_TEMPERATURES = (0.001, 0.1)
"""Of the paper: the first for Mistral and Granite, the second for Llama 3.1 and Phi-4."""

Read = Callable[[str, Sequence[str]], HeadFeatures]
Detection = Literal["core", "qr"]
"""Which score ranks the heads: SCoRe, or calibrated attention on the relevant document alone."""


class Case(NamedTuple):
    """One prompt of the detection: a question, one relevant document among hard negatives."""

    question: str
    query: str
    documents: tuple[str, ...]
    positive: int
    """Where the relevant document stands."""


def detection_cases(
    collection: Collection,
    run: Mapping[str, Sequence[str]],
    questions: int | None = 200,
    negatives: int = 19,
    positions: int = 2,
    seed: int = 0,
) -> list[Case]:
    """Prompts with one relevant document each, at positions spread over the list.

    The negatives are the first stage's best that are not judged relevant, in its order. The
    relevant one has the best grade; of several, the one that the first stage ranks first.

    Args:
        collection: Documents, queries and judgments.
        run: Document ids per query id, best first.
        questions: How many, drawn by ``seed`` from those that have a relevant document and
            enough negatives; ``None`` for all.
        negatives: Hard negatives beside the relevant document.
        positions: Prompts per question, the relevant document moved evenly through the list.
        seed: Seed of the drawing, and of where the relevant document stands first.

    Raises:
        InvalidInputError: Fewer questions have enough negatives, or a number has no meaning.
    """
    for name, number in (("negatives", negatives), ("positions", positions)):
        if number < 1:
            raise InvalidInputError(f"{name} must be at least 1, got {number}")
    if positions > negatives + 1:
        raise InvalidInputError(
            f"{positions} positions are more than a list of {negatives + 1} documents has"
        )
    draw = random.Random(seed)
    shuffled = sorted(collection.queries)
    draw.shuffle(shuffled)
    cases: list[Case] = []
    used = 0
    for question in shuffled:
        first = draw.randrange(negatives + 1)
        chosen = _choose(collection, question, run.get(question, ()), negatives)
        if chosen is None:
            continue
        positive, others = chosen
        for place in range(positions):
            position = (first + place * (negatives + 1) // positions) % (negatives + 1)
            documents = [*others[:position], positive, *others[position:]]
            cases.append(Case(question, collection.queries[question], tuple(documents), position))
        used += 1
        if used == questions:
            break
    if used == 0 or (questions is not None and used < questions):
        raise InvalidInputError(
            f"{used} of {len(shuffled)} questions have a relevant document and {negatives} "
            f"candidates that are not, {questions or 'at least one'} were asked for; lower "
            "--questions or --negatives, or give a run of more candidates"
        )
    return cases


def _choose(
    collection: Collection, question: str, candidates: Sequence[str], negatives: int
) -> tuple[str, list[str]] | None:
    """The relevant document and its negatives, or ``None`` where there are too few."""
    grades = collection.qrels[question]
    best = max(grades.values())
    if best <= 0:
        return None
    ranks = {document: rank for rank, document in enumerate(candidates)}
    relevant = [document for document, grade in grades.items() if grade == best]
    positive = min(relevant, key=lambda document: (ranks.get(document, len(ranks)), document))
    others = [document for document in candidates if grades.get(document, 0) <= 0][:negatives]
    if len(others) < negatives:
        return None
    texts = collection.passages
    return texts[positive].content, [texts[document].content for document in others]


@dataclass(frozen=True)
class HeadScores:
    """Scores of all heads, each an average over prompts.

    Attributes:
        heads: (layer, head) of every column.
        prompts: How many prompts were averaged.
        core: SCoRe by temperature, shape [heads]: the softmax over documents of the attention
            mass divided by the temperature, at the relevant document.
        core_error: Standard error of each SCoRe.
        qr: Mean calibrated score of the relevant document, shape [heads].
    """

    heads: tuple[tuple[int, int], ...]
    prompts: int
    core: Mapping[float, npt.NDArray[np.float64]]
    core_error: Mapping[float, npt.NDArray[np.float64]]
    qr: npt.NDArray[np.float64]

    def ranking(
        self, method: Detection, temperature: float | None = None, max_layer: int | None = None
    ) -> list[tuple[int, int, float]]:
        """(layer, head, score), best first; ties keep the order of layers and heads.

        Args:
            method: ``core`` or ``qr``.
            temperature: Of ``core``; ``None`` takes the first.
            max_layer: Heads above it are left out.
        """
        if method == "core":
            scores = self.core[next(iter(self.core)) if temperature is None else temperature]
        else:
            scores = self.qr
        ranked = [
            (layer, head, float(score))
            for (layer, head), score in zip(self.heads, scores, strict=True)
            if max_layer is None or layer <= max_layer
        ]
        return sorted(ranked, key=lambda item: -item[2])

    def save(self, path: Path) -> None:
        """Write all scores as JSON: per method and temperature, ``{"layer-head": score}``."""

        def named(scores: npt.NDArray[np.float64]) -> dict[str, float]:
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
    read: Read,
    heads: Sequence[Head],
    cases: Iterable[Case],
    temperatures: Sequence[float] = DEFAULT_TEMPERATURES,
) -> HeadScores:
    """Score every head on every case, all temperatures in one pass over the data.

    Args:
        read: Gives the head features of a query and its documents, all in one prompt.
        heads: The heads that ``read`` reports, in its order.
        cases: The prompts; they are looked at one by one.
        temperatures: Of SCoRe's softmax.

    Raises:
        InvalidInputError: There are no cases, or a temperature is not above zero.
    """
    if not temperatures or min(temperatures) <= 0:
        raise InvalidInputError(f"temperatures must be above 0, got {list(temperatures)}")
    count = 0
    core = np.zeros((2, len(temperatures), len(heads)))
    qr = np.zeros(len(heads))
    for case in cases:
        features = read(case.query, case.documents)
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
    """What `find_heads` found.

    Attributes:
        head_set: The best heads.
        scores: Of all heads.
    """

    head_set: HeadSet
    scores: HeadScores


def find_heads(
    reader: HeadReader,
    data: Sequence[JudgedRun],
    method: Detection = "core",
    num_heads: int = PUBLISHED_CORE_HEADS,
    *,
    negatives: int = 19,
    positions: int = 2,
    temperatures: Sequence[float] = DEFAULT_TEMPERATURES,
    window: int | None = None,
    reverse: bool = False,
    seed: int = 0,
    name: str = "found",
    show_progress: bool = False,
) -> FoundHeads:
    """Score every head on judged questions, and take the best.

    An interrupted run goes on where it was: what the model said is kept by the reader.

    Args:
        reader: Reads the heads of a model.
        data: Questions, judgments and the runs that hard negatives are taken from; the heads are to
            be of no one domain, so there may be several.
        method: Which score ranks the heads.
        num_heads: How many are taken.
        negatives: See `detection_cases`.
        positions: See `detection_cases`.
        temperatures: Of SCoRe; the first ranks the heads.
        window: Documents a prompt to rerank with, for the head set.
        reverse: Whether to rerank with the best candidate next to the query, likewise.
        seed: Seed of the drawing.
        name: Of the head set.
        show_progress: Whether a bar on standard error says how far this is.

    Raises:
        InvalidInputError: A file cannot be read, too few questions have enough negatives, or a
            number or the method has no meaning.
    """
    if method not in get_args(Detection):
        raise InvalidInputError(f"method must be core or qr, got {method!r}")
    cases = []
    for source in data:
        collection = Collection.load(source.folder, source.split)
        ranked = load_run(source.run, collection)
        cases += detection_cases(collection, ranked, source.questions, negatives, positions, seed)
    scores = score_heads(
        reader.read,
        reader.heads.heads,
        tracked(cases, len(cases), "Finding heads") if show_progress else cases,
        temperatures,
    )
    ranking = scores.ranking(method)
    head_set = reader.head_set(
        name,
        HeadSet.from_ranking(ranking, num_heads).heads,
        ScoringConfig(window=window, reverse=reverse),
        method,
        {
            "source": "core-rerank heads find",
            "data": [source.folder.name for source in data],
            "split": [source.split for source in data],
            "run": [source.run.name for source in data],
            "questions": len(cases) // positions,
            "negatives": negatives,
            "positions": positions,
            "prompts": scores.prompts,
            **({"temperature": temperatures[0]} if method == "core" else {}),
            "seed": seed,
        },
        ranking,
    )
    return FoundHeads(head_set, scores)
