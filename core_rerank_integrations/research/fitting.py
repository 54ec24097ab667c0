"""From judged candidates to a head set with weights, a first stage's part and probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from core_rerank_integrations._internal.progress import tracked
from core_rerank_integrations.heads.head_set import HeadSet
from core_rerank_integrations.heads.scoring_config import ScoringConfig
from core_rerank_integrations.research.features import HeadReader
from core_rerank_integrations.research.fit_scoring import calibrate, choose_first_stage
from core_rerank_integrations.research.sources import JudgedRun, draw
from core_rerank_integrations.research.weights import (
    DEFAULT_STRENGTHS,
    Trial,
    choose_weights,
    judged_lists,
    with_contrast,
)
from core_rerank_integrations.scorer import Progress, no_progress


class FittedHeads(NamedTuple):
    """What `fit_heads` chose, and from what.

    Attributes:
        head_set: The heads with their weights.
        trials: One for each strength of the penalty.
    """

    head_set: HeadSet
    trials: list[Trial]


def fit_heads(
    reader: HeadReader,
    train: Sequence[JudgedRun],
    dev: Sequence[JudgedRun],
    *,
    window: int = 1,
    reverse: bool = False,
    passage_tokens: int | None = None,
    candidates: int = 20,
    dev_candidates: int = 20,
    strengths: Sequence[float] = DEFAULT_STRENGTHS,
    max_heads: int | None = None,
    seed: int = 0,
    name: str = "fitted",
    on_trial: Callable[[Trial], None] = lambda _: None,
    show_progress: bool = False,
) -> FittedHeads:
    """Fit a sparse weight for every head, and take the fit that ranks best on ``dev``.

    What the model says about a list is kept by the reader: a second fit takes seconds.

    Args:
        reader: Reads the heads of a model.
        train: What to fit on.
        dev: What to choose by, all of them counting alike. A question is fitted on or judged by,
            never both.
        window: Documents a prompt. With 1 a score is of question and document alone, and is
            calibrated as a probability on ``dev``.
        reverse: Whether a prompt shows its documents last first, the best next to the query.
        passage_tokens: See `ScoringConfig`; how long the documents were that were fitted on.
        candidates: Candidates a question to fit on.
        dev_candidates: The same, to choose by.
        strengths: Of the penalty; see `choose_weights`.
        max_heads: Fits with more heads are passed over.
        seed: Seed of the drawing.
        name: Of the head set.
        on_trial: Told of each trial.
        show_progress: Whether bars on standard error say how far this is.

    Raises:
        InvalidInputError: A file cannot be read, too few questions are left to draw, there is
            nothing to fit on, or no strength leaves a usable number of heads.
        StorageError: What was read cannot be written or read back.
    """
    # Dev draws first, so that what it judges by stays the same however much is fitted on.
    drawn = draw([*dev, *train], seed)
    judging_by, fitting_on = drawn[: len(dev)], drawn[len(dev) :]
    read = partial(judged_lists, reader, window=window, reverse=reverse)

    def shown(label: str) -> Progress:
        return partial(tracked, what=label) if show_progress else no_progress

    lists = [
        item
        for source in fitting_on
        for item in read(
            with_contrast(source, candidates),
            candidates=candidates,
            tracked=shown(source.source.folder.name),
        )
    ]
    judges = [
        (
            source.collection,
            read(source, candidates=dev_candidates, tracked=shown(source.source.folder.name)),
        )
        for source in judging_by
    ]
    best, trials = choose_weights(lists, judges, strengths, max_heads=max_heads, progress=on_trial)
    calibration = None
    if window == 1:
        calibration = calibrate(
            [(best.weights.scores(item), item.grades) for item in group] for _, group in judges
        )
    head_set = reader.head_set(
        name,
        best.weights.chosen([(head.layer, head.head) for head in reader.heads.heads]),
        ScoringConfig(
            window=window,
            reverse=reverse,
            passage_tokens=passage_tokens,
            # The weights are of sums over all of a document's tokens.
            drop_outliers=False,
            calibration=calibration,
            **choose_first_stage(best.weights, judges)._asdict(),
        ),
        "fit",
        {
            "source": "core-rerank heads fit",
            "train": [source.label for source in fitting_on],
            "dev": [source.label for source in judging_by],
            "lists": len(lists),
            "candidates": candidates,
            "dev_candidates": dev_candidates,
            "l1": best.weights.l1,
            "dev_ndcg10": round(best.score, 4),
            "seed": seed,
        },
    )
    return FittedHeads(head_set, trials)
