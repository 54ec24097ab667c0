"""A model with an adapter and head weights, all of which are trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core_rerank_integrations.backends.transformers.checks import check_layer_types, torch_dtype
from core_rerank_integrations.backends.transformers.packing import ATTENTION_NAME
from core_rerank_integrations.errors import InvalidInputError, ModelError, requires_extra
from core_rerank_integrations.heads.head_set import HeadSet
from core_rerank_integrations.method.windows import Candidates, Layout, Window, WindowPlanner
from core_rerank_integrations.models.encoder import load_encoder
from core_rerank_integrations.models.local_model import (
    LocalModel,
    truncated_config,
    without_load_report,
)
from core_rerank_integrations.research.options import L1_STRENGTHS, TuneOptions
from core_rerank_integrations.research.tuning.lists import TuningList
from core_rerank_integrations.research.tuning.low_rank import fuse_adapters
from core_rerank_integrations.research.tuning.reading import calibrated_masses
from core_rerank_integrations.research.weights import (
    Array,
    JudgedList,
    ListwiseLoss,
    fit_weights,
    heads_scale,
)

with requires_extra("tune"):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModel

UNUSED_IN_LAST_LAYER = ("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Projections that come after the queries and keys of the highest layer."""
MAX_TOKENS = 3072
"""Maximum number of tokens whose activations are in memory for gradients, unless one prompt has
more."""
START_LISTS = 400
"""Number of lists that the first head weights are fitted on. Fewer give large weights to noise,
which the adapter then has to work against."""
SCALE_LISTS = 100
"""Number of lists that the deviations of the masses are taken from, where weights are given."""
START_INTERCEPT = -1.5
RIGHT_WEIGHT = 3.0
"""Weight of a right document in the loss of probabilities; a list holds several wrong ones."""


class Ranker(nn.Module):
    """Score documents by weighted sums of calibrated attention, as `CoReReranker` does.

    A document's score is the sum over heads of ``weight * mass``; the mass is read in a prompt
    of one document, and longer documents are scored by their best passage. The weights are kept
    for masses of unit deviation, so that one learning rate serves all heads.

    Args:
        model: The model.
        options: Layers, adapter and lengths.
        started: Head set to start from; ``None`` for a fit to the model as it is.

    Raises:
        InvalidInputError: The model has fewer layers.
        UnsupportedModelError: The model's attention cannot be read.
        ModelError: The model cannot be loaded.
    """

    scale: Tensor

    def __init__(
        self, model: LocalModel, options: TuneOptions, started: HeadSet | None = None
    ) -> None:
        super().__init__()
        self.device = torch.device(
            options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        )
        dtype = torch_dtype(options.training_dtype, self.device)
        config = model.config()
        max_context: int = config.max_position_embeddings
        self.layers = kept_layers(config.num_hidden_layers, options, started)
        check_layer_types(config, self.layers)
        for name, value in truncated_config(config, self.layers).items():
            setattr(config, name, value)
        self.heads_per_layer: int = config.num_attention_heads
        self._started = started
        self._is_cut = is_cut(self.layers, started)
        self.model = self._with_adapter(self._load(model, config, dtype), options.rank)
        fuse_adapters(self.model)
        self._first = [parameter.detach().clone() for parameter in self.adapter_parameters]
        heads = self.layers * self.heads_per_layer
        self.register_buffer("scale", torch.ones(heads, device=self.device))
        self.weights = nn.Parameter(torch.zeros(heads, device=self.device))
        self.log_slope = nn.Parameter(torch.tensor(0.0, device=self.device))
        self.intercept = nn.Parameter(torch.tensor(START_INTERCEPT, device=self.device))
        encoder = load_encoder(model, options.template or (started.template if started else None))
        self.template = encoder.template.name
        self._planner = WindowPlanner(encoder, max_context)
        self._layout = Layout(
            documents_per_prompt=1,
            passage_tokens=options.passage_tokens,
            max_document_tokens=options.max_document_tokens,
        )

    def _load(self, model: LocalModel, config: Any, dtype: torch.dtype) -> Any:
        try:
            with without_load_report():
                return AutoModel.from_pretrained(
                    model.path,
                    config=config,
                    dtype=dtype,
                    device_map={"": self.device},
                    attn_implementation=ATTENTION_NAME,
                )
        except (OSError, ValueError) as error:
            raise ModelError(f"Transformers cannot load {model.path}: {error}") from error

    def _with_adapter(self, base: Any, rank: int) -> Any:
        """Return a model with the adapter to start from, or with a new one, which does nothing."""
        unused = rf".*layers\.{self.layers - 1}\..*({'|'.join(UNUSED_IN_LAST_LAYER)})"
        if self._started is not None and self._started.adapter is not None:
            path = self._started.adapter.path
            config = LoraConfig.from_pretrained(path)
            config.exclude_modules = unused
            return PeftModel.from_pretrained(base, path, config=config, is_trainable=True)
        adapter = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", exclude_modules=unused
        )
        return get_peft_model(base, adapter)

    @property
    def adapter_parameters(self) -> list[nn.Parameter]:
        """The parameters of the adapter."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def masses(self, question: str, documents: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Compute the calibrated mass of every head on each passage, without gradients.

        Returns:
            The masses, [passages, heads], and the document of each passage, [passages].
        """
        windows = self._windows(question, documents)
        with torch.no_grad():
            masses = [
                calibrated_masses(self.model, part, self.layers) for part in in_parts(windows)
            ]
        return torch.cat(masses), self._owners(windows)

    def forward(self, question: str, documents: Sequence[str]) -> Tensor:
        """Compute the scores of documents, shape [documents], without gradients."""
        masses, owners = self.masses(question, documents)
        with torch.no_grad():
            return _best(self._scores(masses), owners, len(documents))

    def add_gradients(self, item: TuningList, probability_weight: float, share: float) -> float:
        """Add the gradients of the loss of one list to those of the parameters.

        The loss is the cross-entropy of the right document in the softmax of the scores, and
        ``probability_weight`` times the mean logistic loss of the probabilities. A long list is
        read twice: first for the scores, then part by part for the gradients, so that the memory
        is that of a part.

        Args:
            item: The list.
            probability_weight: Weight of the loss of probabilities.
            share: Factor of the gradients.

        Returns:
            The loss.
        """
        windows = self._windows(item.question, item.documents)
        parts = in_parts(windows)
        with torch.set_grad_enabled(len(parts) == 1):
            read = torch.cat([self._read(part) for part in parts])
        scores = read if len(parts) == 1 else read.requires_grad_()
        best = _best(scores, self._owners(windows), len(item.documents))
        loss = self._loss(best, len(item.right), probability_weight)
        torch.autograd.backward(loss * share)
        if len(parts) > 1 and scores.grad is not None:
            for part, gradient in zip(
                parts, torch.split_with_sizes(scores.grad, list(map(len, parts))), strict=True
            ):
                torch.autograd.backward(self._read(part), gradient)
        return loss.item()

    def _windows(self, question: str, documents: Sequence[str]) -> list[Window]:
        return self._planner.windows(Candidates(question, tuple(documents)), self._layout)

    def _owners(self, windows: Sequence[Window]) -> Tensor:
        """Return the document of each passage, [passages]."""
        return torch.tensor([window.indices[0] for window in windows], device=self.device)

    def _read(self, windows: Sequence[Window]) -> Tensor:
        """Return the score of each passage, [passages]."""
        return self._scores(calibrated_masses(self.model, windows, self.layers))

    def _scores(self, masses: Tensor) -> Tensor:
        return (masses / self.scale) @ self.weights

    def _loss(self, scores: Tensor, right: int, probability_weight: float) -> Tensor:
        """Return the loss of scores, the first ``right`` of which are of right documents."""
        is_right = torch.zeros_like(scores)
        is_right[:right] = 1
        loss = probability_weight * F.binary_cross_entropy_with_logits(
            self.log_slope.exp() * scores + self.intercept,
            is_right,
            weight=1 + (RIGHT_WEIGHT - 1) * is_right,
        )
        return loss - F.log_softmax(scores, dim=0)[:right].mean() if right else loss

    @property
    def start_lists(self) -> int:
        """Number of lists that `start` takes."""
        return SCALE_LISTS if self._has_weights else START_LISTS

    @property
    def _has_weights(self) -> bool:
        """Whether there are head weights to start from, for all of the layers that they need."""
        return self._started is not None and not self._is_cut

    def start(self, lists: Sequence[TuningList]) -> None:
        """Set the first head weights: those to start from, or else a fit to the model.

        Args:
            lists: Lists with right and wrong documents, by which masses are scaled to unit
                deviation.
        """
        judged = []
        for item in lists:
            masses, owners = self.masses(item.question, item.documents)
            grades = (owners < len(item.right)).double().cpu().numpy()
            features = masses.double().cpu().numpy()
            judged.append(JudgedList("", (), features, grades, None, np.zeros(len(grades))))
        scale = heads_scale(judged)
        weights = self._weights_to_start_from() if self._has_weights else _first_weights(judged)
        if self._started is not None and (calibration := self._started.scoring.calibration):
            nn.init.constant_(self.log_slope, math.log(calibration.slope))
            nn.init.constant_(self.intercept, calibration.intercept)
        self.scale.copy_(torch.as_tensor(scale))
        with torch.no_grad():
            self.weights.copy_(torch.as_tensor(weights * scale))

    def _weights_to_start_from(self) -> Array:
        weights = np.zeros(self.layers * self.heads_per_layer)
        for head in self._started.heads if self._started else ():
            weights[head.layer * self.heads_per_layer + head.head] = head.weight
        return weights

    def average(self, share: float) -> None:
        """Average adapter and head weights with those of the head set to start from.

        Args:
            share: Weight of the head set to start from, from 0 to 1. `check_average` tells
                whether there is one.
        """
        first = torch.as_tensor(self._weights_to_start_from(), device=self.device) * self.scale
        with torch.no_grad():
            pairs = zip(self.adapter_parameters, self._first, strict=True)
            for trained, started in ((self.weights, first), *pairs):
                trained.lerp_(started.to(trained.dtype), share)

    def head_weights(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return the weights for masses as they are, shape [heads]."""
        weights = self.weights.detach().double() / self.scale.double()
        return weights.cpu().numpy()

    def trained(self) -> dict[str, Tensor]:
        """Return copies of everything that is trained, by name."""
        names = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {
            name: tensor.detach().clone()
            for name, tensor in self.state_dict().items()
            if name in names or name == "scale"
        }

    def restore(self, trained: Mapping[str, Tensor]) -> None:
        """Set everything that is trained."""
        self.load_state_dict(trained, strict=False)

    def save_adapter(self, folder: Path, base: str | None) -> None:
        """Write the adapter in PEFT's format, in bfloat16.

        Args:
            folder: Folder of its files.
            base: Hub id of the model, if known.
        """
        config = self.model.peft_config["default"]
        config.base_model_name_or_path = base or ""  # PEFT would name a folder of this machine.
        config.target_modules = sorted(config.target_modules)  # A set has another order each time.
        for parameter in self.adapter_parameters:
            parameter.data = parameter.data.to(torch.bfloat16)
        # By default, PEFT would ask the hub whether the vocabulary is that of the base.
        self.model.save_pretrained(folder, save_embedding_layers=False)


def _first_weights(lists: Sequence[JudgedList]) -> Array:
    """Fit weights with the penalty whose loss is lowest on a quarter of the lists, [heads]."""
    border = math.ceil(len(lists) * 3 / 4)
    fitted, held_back = lists[:border], lists[border:] or lists
    loss = ListwiseLoss([item.features for item in held_back], [item.grades for item in held_back])
    trials = [fit_weights(fitted, l1) for l1 in L1_STRENGTHS]
    return min(trials, key=lambda weights: loss.value_and_gradient(weights)[0])


def in_parts(windows: Sequence[Window]) -> list[list[Window]]:
    """Divide prompts into parts of at most `MAX_TOKENS`; a longer prompt is a part of its own."""
    parts: list[list[Window]] = [[]]
    tokens = 0
    for window in windows:
        length = len(window.prefix.ids) + len(window.question)
        if parts[-1] and tokens + length > MAX_TOKENS:
            parts.append([])
            tokens = 0
        parts[-1].append(window)
        tokens += length
    return parts


def _best(scores: Tensor, owners: Tensor, documents: int) -> Tensor:
    """Return the score of the best passage of each document, [documents]."""
    best = scores.new_full((documents,), -torch.inf)
    return best.scatter_reduce(0, owners, scores, "amax")


def kept_layers(total: int, options: TuneOptions, started: HeadSet | None) -> int:
    """Return the number of layers that run, of a model of ``total``.

    Raises:
        InvalidInputError: The model has fewer, or the head set to start from has too few or needs
            more.
    """
    if started is not None and started.adapter is not None:
        given = started.adapter.layers
        if options.layers is not None and options.layers > given:
            raise InvalidInputError(
                f"layers={options.layers}, but the adapter of the heads {started.name!r} to start "
                f"from has {given}; give at most {given}"
            )
        return options.layers or given
    if options.layers is not None and options.layers > total:
        raise InvalidInputError(f"layers={options.layers}, but the model has {total}")
    if started is not None:
        needed = started.highest_layer + 1
        if options.layers is not None and options.layers < needed:
            raise InvalidInputError(
                f"layers={options.layers}, but the heads {started.name!r} to start from need "
                f"{needed}; leave start or layers out"
            )
        return options.layers or needed
    return options.layers or max(1, round(total / 3))


def is_cut(layers: int, started: HeadSet | None) -> bool:
    """Return whether fewer layers run than the adapter to start from has."""
    return started is not None and started.adapter is not None and layers < started.adapter.layers


def check_average(options: TuneOptions, started: HeadSet | None) -> None:
    """Check that there is an adapter to average with.

    Raises:
        InvalidInputError: There is none, or not all of its layers run.
    """
    if not options.average:
        return
    if started is None or started.adapter is None:
        raise InvalidInputError(
            f"average={options.average:g}, but there is no adapter to average with: give heads "
            "with an adapter as start, or leave average out"
        )
    if options.layers is not None and is_cut(options.layers, started):
        raise InvalidInputError(
            f"average={options.average:g} needs all {started.adapter.layers} layers of the heads "
            f"{started.name!r} to start from; leave layers={options.layers} out, or average"
        )
