"""Tuning heads: from options to a head set with an adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from core_rerank_integrations._internal.files import write_atomically
from core_rerank_integrations._internal.progress import Progress, no_progress, progress_bar
from core_rerank_integrations.backends.loading import allows_adapter, chosen_backend
from core_rerank_integrations.errors import InvalidInputError, requires_extra
from core_rerank_integrations.heads.head_set import Adapter, Head, HeadSet, Provenance
from core_rerank_integrations.heads.scoring_config import Calibration, ScoringConfig, log_odds
from core_rerank_integrations.heads.shipped import head_set_for
from core_rerank_integrations.method.templates import TEMPLATES
from core_rerank_integrations.models.adapter import (
    ADAPTER_FILES,
    adapter_checksum,
    adapter_folder,
    check_mergeable,
    with_adapter,
)
from core_rerank_integrations.models.local_model import LocalModel, cache_folder, model_shape
from core_rerank_integrations.models.resolve import resolve
from core_rerank_integrations.research.abstention_fit import (
    JudgedLogOdds,
    fit_answerability,
    shows_answerability,
)
from core_rerank_integrations.research.evidence_fit import answered_documents, fit_evidence
from core_rerank_integrations.research.features import versions
from core_rerank_integrations.research.options import EvidenceOptions, TuneOptions
from core_rerank_integrations.research.scoring_fit import calibrate, choose_first_stage
from core_rerank_integrations.research.sources import Sample, draw_samples
from core_rerank_integrations.research.tuning.lists import TuningList, tuning_lists
from core_rerank_integrations.research.weights import Array, JudgedList
from core_rerank_integrations.scorer import AttentionScorer, load_scorer
from core_rerank_integrations.settings import RerankerSettings

with requires_extra("tune"):
    import torch

    from core_rerank_integrations.research.tuning.ranker import Ranker, check_average
    from core_rerank_integrations.research.tuning.training import Evaluation, Training

ONE: Array = np.ones(1)
"""The weight of a score, which is the only feature of a scored list."""


class TunedHeads(NamedTuple):
    """Result of `tune_heads`.

    Attributes:
        head_set: The heads, with their adapter, probabilities and answerability.
        evaluations: The ranking of the dev lists during the training.
        checkpoint: File of the checkpoint.
    """

    head_set: HeadSet
    evaluations: list[Evaluation]
    checkpoint: Path

    def save(self, path: Path) -> None:
        """Write the head set, and delete the checkpoint, which nothing needs from then on.

        Raises:
            StorageError: The file cannot be written.
        """
        self.head_set.save(path)
        self.checkpoint.unlink(missing_ok=True)


def tune_heads(options: TuneOptions, *, show_progress: bool = False) -> TunedHeads:
    """Train an adapter and head weights together, and fit probabilities and answerability.

    The model keeps its first layers only. An interrupted run continues from its checkpoint, which
    is kept until `TunedHeads.save`; the same options, lists, machine and number of threads give the
    same result.

    Args:
        options: The model, the data and the training.
        show_progress: Whether to show progress bars on standard error.

    Raises:
        InvalidInputError: An option is invalid, a file cannot be read, too few questions are left
            to draw, there is nothing to train on or to choose by, or the loss is not a number.
        HeadSetError: The head set to start from belongs to another model.
        ModelError: The model cannot be found, downloaded or loaded.
        UnsupportedModelError: The attention of the model cannot be read.
        StorageError: The checkpoint or the adapter cannot be written.
    """
    model = resolve(options.model)
    started = None if options.start is None else _to_start_from(options.start, model)
    check_average(options, started)
    _check_end(model, options)
    dev = draw_samples(options.dev, options.seed)
    train = draw_samples([source.run for source in options.train], options.seed, apart_from=dev)
    sources = [_lists(sample, options.candidates) for sample in train]
    if not any(item.right for lists in sources for item in lists):
        raise InvalidInputError("no list to train on has a right document")
    chosen_by = _chosen_by(dev, options)
    torch.manual_seed(options.seed)
    ranker = Ranker(model, options, started)
    checkpoint = options.checkpoints or cache_folder("tuning")
    checkpoint /= f"{_digest(model, options, started, sources, dev)}.pt"
    training = Training(ranker, sources, chosen_by, options, checkpoint)
    evaluations = training.run(progress_bar(show_progress, "Training"))
    if options.average:
        ranker.average(options.average)
    name = options.name or "tuned"
    adapter = options.adapter or Path(name)
    # The adapter of an earlier head set is not replaced before all is fitted.
    with TemporaryDirectory() as folder:
        ranker.save_adapter(Path(folder), model.model_id)
        heads = _head_set(ranker, model, Path(folder), options, name)
        progress = progress_bar(show_progress, "Fitting probabilities")
        heads = _with_scoring(heads, model, options, dev, progress)
        if options.evidence is not None:
            heads = fit_evidence(
                EvidenceOptions(heads=heads, data=options.evidence, **_reading(options)),
                show_progress=show_progress,
            )
        adapter.mkdir(parents=True, exist_ok=True)
        for file in ADAPTER_FILES:
            write_atomically(adapter / file, (Path(folder) / file).read_bytes())
    heads = heads.model_copy(
        update={
            "adapter": _at(adapter, heads),
            "provenance": Provenance(
                method="tuned",
                details={
                    "source": "core-rerank heads tune",
                    "train": [
                        f"{sample.label}, weight {source.weight:g}"
                        for sample, source in zip(train, options.train, strict=True)
                    ],
                    "dev": [sample.label for sample in dev],
                    "steps": _best(evaluations).steps,
                    "lists_per_step": options.lists_per_step,
                    "documents": options.documents,
                    "rank": options.rank,
                    "learning_rate": options.learning_rate,
                    "probability_weight": options.probability_weight,
                    "dev_ndcg10": round(_best(evaluations).mean, 4),
                    "seed": options.seed,
                    **({} if started is None else {"start": started.name}),
                    **({"average": options.average} if options.average else {}),
                    **heads.provenance.details,
                    **versions(),
                },
            ),
        }
    )
    return TunedHeads(heads, evaluations, checkpoint)


def _to_start_from(heads: HeadSet | str | Path, model: LocalModel) -> HeadSet:
    """Return a head set of a model, with its adapter in a folder of this machine.

    Raises:
        HeadSetError: It belongs to another model, or its adapter does.
    """
    started = head_set_for(heads, model.model_id)
    started.check(model.model_id, model_shape(model.config()))
    with_adapter(model, started)  # Checks that it fits.
    if started.adapter is None:
        return started
    adapter = _at(adapter_folder(started.adapter.path), started)
    return started.model_copy(update={"adapter": adapter})


def _at(folder: Path, heads: HeadSet) -> Adapter | None:
    """Return the adapter of heads, in a folder."""
    if heads.adapter is None:
        return None
    return heads.adapter.model_copy(update={"path": str(folder.absolute())})


def _check_end(model: LocalModel, options: TuneOptions) -> None:
    """Check what is needed after the training, before it takes its time.

    Raises:
        InvalidInputError: A setting is invalid, or the evidence data cannot be used.
        ModelError: The model has no weights in safetensors files.
        UnsupportedModelError: No adapter can be merged into the model.
    """
    settings = _settings(options)
    if not allows_adapter(settings.backend):
        raise InvalidInputError(
            f"backend={settings.backend!r} cannot run tuned heads, because an engine that also "
            "generates needs the model's weights unchanged; use another backend"
        )
    check_mergeable(model)
    if options.evidence is not None:
        answered_documents(options.evidence, "train")


def _best(evaluations: Sequence[Evaluation]) -> Evaluation:
    return max(evaluations, key=lambda evaluation: evaluation.mean)


def _lists(sample: Sample, candidates: int) -> list[TuningList]:
    """Return the lists of a sample.

    Raises:
        InvalidInputError: There is none.
    """
    lists = tuning_lists(sample, candidates)
    if not lists:
        raise InvalidInputError(f"{sample.source.run}: no list has a document that is not relevant")
    return lists


def _chosen_by(dev: Sequence[Sample], options: TuneOptions) -> list[Sample]:
    """Return the questions by which the training is chosen.

    Sources of lists without a relevant document serve probabilities alone.

    Raises:
        InvalidInputError: No list has both relevant and irrelevant documents.
    """
    samples = [sample.with_contrast(options.candidates) for sample in dev]
    chosen = [
        sample._replace(queries=sample.queries[: options.dev_questions])
        for sample in samples
        if sample.queries
    ]
    if not chosen:
        names = ", ".join(str(sample.source.run) for sample in dev)
        raise InvalidInputError(
            f"{names}: no list has both relevant and irrelevant documents to choose by"
        )
    return chosen


def _digest(
    model: LocalModel,
    options: TuneOptions,
    started: HeadSet | None,
    sources: Sequence[Sequence[TuningList]],
    dev: Sequence[Sample],
) -> str:
    """Return a name for the checkpoint: other heads, data or options are another training."""
    unrelated = {
        "adapter",
        "average",
        "backend",
        "checkpoints",
        "dtype",
        "evidence",
        "max_false_abstentions",
        "name",
        "start",
    }
    digest = hashlib.sha256(model.fingerprint().encode())
    digest.update(repr(sorted(options.model_dump(exclude=unrelated).items())).encode())
    if started is not None:
        digest.update(started.model_dump_json(exclude={"adapter"}).encode())
        if started.adapter is not None:
            digest.update(adapter_checksum(Path(started.adapter.path)).encode())
    for lists in (*sources, *(tuning_lists(sample, options.candidates) for sample in dev)):
        digest.update(repr(lists).encode())
    return digest.hexdigest()[:32]


def _reading(options: TuneOptions) -> dict[str, Any]:
    """Return the options of the model that reads with the trained heads."""
    return {"model": options.model, **options.runtime}


def _settings(options: TuneOptions) -> RerankerSettings:
    return RerankerSettings.checked(template=options.template, **_reading(options))


def _head_set(
    ranker: Ranker, model: LocalModel, adapter: Path, options: TuneOptions, name: str
) -> HeadSet:
    """Return the heads as they were trained."""
    shape = model_shape(model.config())
    heads = [
        Head(
            layer=index // shape.num_heads,
            head=index % shape.num_heads,
            weight=float(f"{weight:.6g}"),
        )
        for index, weight in enumerate(ranker.head_weights())
        if weight
    ]
    return HeadSet(
        name=name,
        model=model.model_id,
        model_type=shape.model_type,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        heads=tuple(heads),
        template=ranker.template if ranker.template in TEMPLATES else None,
        scoring=ScoringConfig(
            documents_per_prompt=1, passage_tokens=options.passage_tokens, drop_outliers=False
        ),
        adapter=Adapter(
            path=str(adapter.absolute()),
            base_checksums=(model.weights_checksum(),),
            layers=ranker.layers,
        ),
    )


def _with_scoring(
    heads: HeadSet,
    model: LocalModel,
    options: TuneOptions,
    dev: Sequence[Sample],
    progress: Progress,
) -> HeadSet:
    """Fit probabilities, answerability and the weights of first stages on the dev lists."""
    settings = _settings(options)
    scorer = load_scorer(chosen_backend(settings, model, heads), settings, model, heads)
    try:
        scored = [
            scored_lists(scorer, heads, sample, options.candidates, progress) for sample in dev
        ]
    finally:
        scorer.close()
    calibration = calibrate(
        [_judged(sample, item) for item in lists] for sample, lists in zip(dev, scored, strict=True)
    )
    relevant = [[item for item in lists if item.grades.any()] for lists in scored]
    ranked = [
        (sample.collection, lists) for sample, lists in zip(dev, relevant, strict=True) if lists
    ]
    groups = [
        list(_log_odds(sample, lists, calibration))
        for sample, lists in zip(dev, scored, strict=True)
    ]
    return heads.with_scoring(
        calibration=calibration,
        abstention=fit_answerability(groups, options.max_false_abstentions, options.seed),
        **choose_first_stage(ONE, ranked)._asdict(),
    )


def scored_lists(
    scorer: AttentionScorer,
    heads: HeadSet,
    sample: Sample,
    candidates: int,
    progress: Progress = no_progress,
) -> list[JudgedList]:
    """Score the first ``candidates`` of each question of a sample.

    Args:
        scorer: A scorer that runs ``heads``.
        heads: The heads.
        sample: The questions and their candidates.
        candidates: Maximum number of candidates per question.
        progress: Wraps the questions.

    Returns:
        Lists whose only feature is the score.
    """
    collection, layout = sample.collection, heads.scoring.layout()
    lists = []
    for query in progress(sample.queries, len(sample.queries)):
        run = sample.run[query][:candidates]
        names = tuple(name for name, _ in run)
        (scored,) = scorer.score([collection.candidates(query, names)], heads, layout)
        lists.append(
            JudgedList(
                query,
                names,
                scored.scores[:, None],
                np.array([max(collection.qrels[query].get(name, 0), 0.0) for name in names]),
                sample.source.first_stage,
                np.array([score for _, score in run]),
            )
        )
    return lists


def _judged(sample: Sample, item: JudgedList) -> tuple[Array, Array]:
    """Return scores and grades, without unjudged documents that contain an answer."""
    collection = sample.collection
    is_known = np.array(
        [
            grade > 0 or not collection.has_answer(item.query, collection.passages[name].content)
            for name, grade in zip(item.documents, item.grades, strict=True)
        ]
    )
    return item.features[is_known, 0], item.grades[is_known]


def _log_odds(
    sample: Sample, lists: Sequence[JudgedList], calibration: Calibration
) -> Iterator[JudgedLogOdds]:
    """Yield the log-odds of the candidates of each list that shows answerability."""
    for item in lists:
        scores, grades = _judged(sample, item)
        if shows_answerability((grades > 0).tolist(), sample.collection.qrels[item.query]):
            odds = log_odds(calibration.probabilities(scores))
            yield JudgedLogOdds(odds[grades > 0], odds[grades == 0])
