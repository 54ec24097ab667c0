"""Fitting: from judged candidates to a head set with weights, a first stage and probabilities."""

from __future__ import annotations

from typing import NamedTuple

from core_rerank_integrations._internal.progress import progress_bar
from core_rerank_integrations.heads.head_set import HeadSet
from core_rerank_integrations.heads.scoring_config import ScoringConfig
from core_rerank_integrations.method.windows import Layout
from core_rerank_integrations.research.features import HeadReader
from core_rerank_integrations.research.options import FitOptions
from core_rerank_integrations.research.scoring_fit import calibrate, choose_first_stage
from core_rerank_integrations.research.sources import Sample, draw_samples
from core_rerank_integrations.research.weights import (
    JudgedList,
    Trial,
    choose_weights,
    judged_lists,
    selected_heads,
)


class FittedHeads(NamedTuple):
    """Result of `fit_heads`.

    Attributes:
        head_set: The heads with their weights.
        trials: One for each strength of the penalty.
    """

    head_set: HeadSet
    trials: list[Trial]


def fit_heads(options: FitOptions, *, show_progress: bool = False) -> FittedHeads:
    """Fit a sparse weight for every head, and choose the fit that ranks best on ``dev``.

    What the model computes is stored, so that a second fit takes seconds; see `HeadReader`.

    Args:
        options: The model, the data and the fit.
        show_progress: Whether to show progress bars on standard error.

    Raises:
        InvalidInputError: A file cannot be read, too few questions are left to draw, there is
            nothing to fit on, or no strength leaves a usable number of heads.
        HeadSetError: The model has no layer ``max_layer``.
        ModelError: The model cannot be found, downloaded, or read exactly.
        StorageError: Features cannot be written or read back.
    """
    dev = draw_samples(options.dev, options.seed)
    train = draw_samples(options.train, options.seed, apart_from=dev)
    layout = Layout(options.documents_per_prompt, options.best_last)

    def read(sample: Sample, candidates: int) -> list[JudgedList]:
        progress = progress_bar(show_progress, sample.source.folder.name)
        return judged_lists(reader, sample, layout, candidates, progress)

    with HeadReader(options) as reader:
        lists = [
            item
            for sample in train
            for item in read(sample.with_contrast(options.candidates), options.candidates)
        ]
        dev_sets = [(sample.collection, read(sample, options.dev_candidates)) for sample in dev]
    progress = progress_bar(show_progress, "Fitting")
    best, trials = choose_weights(lists, dev_sets, options.l1, options.max_heads, progress)
    calibration = None
    if options.documents_per_prompt == 1:
        calibration = calibrate(
            [(item.features @ best.weights, item.grades) for item in group] for _, group in dev_sets
        )
    head_set = reader.head_set(
        options.name or "fitted",
        selected_heads(best.weights, reader.heads.heads),
        ScoringConfig(
            documents_per_prompt=options.documents_per_prompt,
            best_last=options.best_last,
            passage_tokens=options.passage_tokens,
            # The weights are fitted for sums over all tokens of a document.
            drop_outliers=False,
            calibration=calibration,
            **choose_first_stage(best.weights, dev_sets)._asdict(),
        ),
        "fit",
        {
            "source": "core-rerank heads fit",
            "train": [sample.label for sample in train],
            "dev": [sample.label for sample in dev],
            "lists": len(lists),
            "candidates": options.candidates,
            "dev_candidates": options.dev_candidates,
            "l1": best.l1,
            "dev_ndcg10": round(best.ndcg, 4),
            "seed": options.seed,
        },
    )
    return FittedHeads(head_set, trials)
