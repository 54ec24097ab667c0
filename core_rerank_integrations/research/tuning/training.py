"""The training loop: steps, a choice by dev lists, and checkpoints."""

from __future__ import annotations

import io
import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from core_rerank_integrations._internal.files import write_atomically
from core_rerank_integrations._internal.progress import Progress, no_progress
from core_rerank_integrations.errors import InvalidInputError, StorageError
from core_rerank_integrations.research.options import TuneOptions
from core_rerank_integrations.research.sources import Sample
from core_rerank_integrations.research.tuning.lists import Mixture, TuningList
from core_rerank_integrations.research.tuning.ranker import Ranker
from core_rerank_integrations.research.weights import JudgedList, mean_ndcg

log = logging.getLogger(__name__)

WEIGHTS_RATE = 0.002
"""Learning rate of the head weights, for masses of unit deviation."""
PROBABILITY_RATE = 0.01
MAX_GRADIENT_NORM = 1.0
FIRST_STEPS = 30
"""Number of steps in which the learning rates rise to their values."""
LAST_RATE = 0.02
"""Share of the learning rates that is left at the end."""
CHECKPOINT_STEPS = 50


class Evaluation(NamedTuple):
    """The ranking of the dev lists after a number of steps.

    Attributes:
        steps: Number of steps.
        loss: Mean loss of the lists that were trained on since the last evaluation.
        ndcg: Mean nDCG@10 of each dev source.
    """

    steps: int
    loss: float
    ndcg: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the dev sources, which count alike."""
        return float(np.mean(self.ndcg))


@dataclass
class State:
    """Where a training is.

    Attributes:
        steps: Number of steps that were made.
        losses: Losses of the lists since the last evaluation.
        evaluations: Evaluations up to here.
        best: What was trained, at the best evaluation.
    """

    steps: int = 0
    losses: list[float] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)


class Training:
    """Train a `Ranker`, and continue where an interrupted training was.

    Args:
        ranker: The model, its adapter and the head weights.
        sources: The lists of each source to train on.
        dev: Questions to choose by.
        options: Steps, learning rate and the like.
        checkpoint: File that holds the state of the training. It must belong to the same model,
            lists and options.
    """

    def __init__(
        self,
        ranker: Ranker,
        sources: Sequence[Sequence[TuningList]],
        dev: Sequence[Sample],
        options: TuneOptions,
        checkpoint: Path,
    ) -> None:
        self._ranker = ranker
        self._dev = dev
        self._options = options
        self._checkpoint = checkpoint
        self._random = random.Random(options.seed)
        weights = [source.weight for source in options.train]
        self._mixture = Mixture(sources, weights, options.documents, self._random)
        heads = [ranker.weights]
        probability = [ranker.log_slope, ranker.intercept]
        others = {id(parameter) for parameter in (*heads, *probability)}
        adapter = [
            parameter for parameter in ranker.adapter_parameters if id(parameter) not in others
        ]
        self._adapter = adapter
        self._rates = (options.learning_rate, WEIGHTS_RATE, PROBABILITY_RATE)
        self._optimizer = torch.optim.AdamW(
            [
                {"params": adapter, "weight_decay": 0.01},
                {"params": heads, "weight_decay": 0.0},
                {"params": probability, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.98),
        )
        self._state = State()

    def run(self, progress: Progress = no_progress) -> list[Evaluation]:
        """Train, and leave the ranker as it was at the best evaluation.

        The training ends early after `TuneOptions.patience` evaluations without a better one.

        Args:
            progress: Wraps the steps.

        Returns:
            All evaluations.

        Raises:
            InvalidInputError: The loss is not a number.
            StorageError: The checkpoint cannot be written or read.
        """
        options, state = self._options, self._state
        if not self._restore():
            self._ranker.start(self._first_lists())
        left = 0 if self._is_over() else options.steps - state.steps
        for _ in progress(range(left), left):
            self._step()
            state.steps += 1
            if state.steps == options.steps or state.steps % options.evaluate_every == 0:
                self._evaluate()
            if state.steps % CHECKPOINT_STEPS == 0 or self._is_over():
                self._save()
            if self._is_over():
                break
        self._ranker.restore(state.best)
        return state.evaluations

    def _first_lists(self) -> list[TuningList]:
        count = self._ranker.start_lists
        draws = (self._mixture.draw() for _ in range(4 * count))
        return [item for item in draws if item.right][:count]

    def _step(self) -> None:
        """Draw lists, and change the parameters by the mean gradient of their losses.

        Raises:
            InvalidInputError: The loss is not a number.
        """
        options = self._options
        share = _rate(self._state.steps, options.steps)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * share
        self._optimizer.zero_grad()
        for _ in range(options.lists_per_step):
            item, share = self._mixture.draw(), 1 / options.lists_per_step
            loss = self._ranker.add_gradients(item, options.probability_weight, share)
            if not math.isfinite(loss):
                raise InvalidInputError(
                    f"the loss is not a number after {self._state.steps} steps: lower "
                    f"learning_rate, which is {options.learning_rate:g}"
                )
            self._state.losses.append(loss)
        torch.nn.utils.clip_grad_norm_(self._adapter, MAX_GRADIENT_NORM)
        self._optimizer.step()

    def _evaluate(self) -> None:
        state = self._state
        ndcg = tuple(map(self._ndcg, self._dev))
        evaluation = Evaluation(state.steps, float(np.mean(state.losses)), ndcg)
        state.losses.clear()
        if not state.best or evaluation.mean > max(item.mean for item in state.evaluations):
            state.best = self._ranker.trained()
        state.evaluations.append(evaluation)
        log.info(
            "%d steps: loss %.3f, nDCG@10 on dev %.4f (%s)",
            evaluation.steps,
            evaluation.loss,
            evaluation.mean,
            ", ".join(f"{ndcg:.4f}" for ndcg in evaluation.ndcg),
        )

    def _ndcg(self, sample: Sample) -> float:
        collection = sample.collection
        scored = []
        for query in sample.queries:
            names = [name for name, _ in sample.run[query][: self._options.candidates]]
            candidates = collection.candidates(query, names)
            scores = self._ranker(candidates.query, candidates.documents)
            empty = np.zeros(len(names))
            judged = JudgedList(query, tuple(names), empty[:, None], empty, None, empty)
            scored.append((judged, scores.double().cpu().numpy()))
        return mean_ndcg(collection, scored)

    def _is_over(self) -> bool:
        if self._state.steps == self._options.steps:
            return True
        means = [evaluation.mean for evaluation in self._state.evaluations]
        return bool(means) and len(means) - means.index(max(means)) > self._options.patience

    def _save(self) -> None:
        state = self._state
        content = io.BytesIO()
        torch.save(
            {
                "steps": state.steps,
                "losses": state.losses,
                "evaluations": [tuple(evaluation) for evaluation in state.evaluations],
                "best": state.best,
                "trained": self._ranker.trained(),
                "optimizer": self._optimizer.state_dict(),
                "random": self._random.getstate(),
                "waiting": self._mixture.waiting,
            },
            content,
        )
        self._checkpoint.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._checkpoint, content.getvalue())

    def _restore(self) -> bool:
        """Continue from the checkpoint, if there is one.

        Raises:
            StorageError: It is damaged.
        """
        if not self._checkpoint.exists():
            return False
        try:
            saved: dict[str, Any] = torch.load(self._checkpoint, weights_only=True)
            self._ranker.restore(saved["trained"])
            self._optimizer.load_state_dict(saved["optimizer"])
            self._random.setstate(saved["random"])
            self._mixture.waiting[:] = saved["waiting"]
        except Exception as error:  # Damaged files raise errors of many types.
            raise StorageError(
                f"cannot continue from {self._checkpoint}: {error}; delete it and run again"
            ) from error
        state = self._state
        state.steps, state.losses = saved["steps"], saved["losses"]
        state.best = saved["best"]
        state.evaluations = [Evaluation(*evaluation) for evaluation in saved["evaluations"]]
        return True


def _rate(step: int, steps: int) -> float:
    """Return the share of the learning rates: it rises, then falls like half a cosine."""
    rise = min(1.0, (step + 1) / FIRST_STEPS)
    fall = LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * step / steps))
    return rise * fall
