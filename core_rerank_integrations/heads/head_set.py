"""Head sets: the heads of a model to read, their weights and their provenance."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator
from pydantic_core import ErrorDetails

from core_rerank_integrations._internal.files import expand_user, write_atomically
from core_rerank_integrations.errors import HeadSetError
from core_rerank_integrations.heads.formats import read_fields, to_json
from core_rerank_integrations.heads.scoring_config import (
    Count,
    Finite,
    Index,
    ScoringConfig,
    Weight,
)
from core_rerank_integrations.method.scoring import Mass

HUB_ID = re.compile(r"[\w-][\w.-]{0,95}/[\w.-]{1,96}(@[\w.-]{1,100})?", re.ASCII)
"""A repository of the Hugging Face hub, perhaps with a branch, tag or commit."""


class ModelShape(NamedTuple):
    """Shape of a model, which must agree with the head set.

    Attributes:
        num_layers: Number of layers.
        num_heads: Number of query heads per layer.
        model_type: Architecture as in the model's ``config.json``.
    """

    num_layers: int
    num_heads: int
    model_type: str


class Head(BaseModel):
    """One attention head; both indices count from zero.

    Attributes:
        layer: Index of its layer.
        head: Index among the query heads of that layer.
        score: Score of the head when the heads were found, if known.
        weight: Weight of its attention in the sum over heads.
        evidence_weight: Weight in the sum that scores sentences; ``None`` if it was not fitted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: Index
    head: Index
    score: Finite | None = None
    weight: Weight = 1.0
    evidence_weight: Weight | None = None


class Provenance(BaseModel):
    """How a head set was made.

    Attributes:
        method: How the heads were found: ``core``, ``qr``, ``icr``, ``fit``, ``tuned`` or
            ``custom``.
        details: Source, data, temperature, licence and the like.
        ranked_heads: All heads of the model as (layer, head, score), best first, if known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = "custom"
    details: dict[str, JsonValue] = Field(default_factory=dict)
    ranked_heads: tuple[tuple[Index, Index, Finite | None], ...] = ()


class Adapter(BaseModel):
    """A LoRA adapter that was trained together with the heads, in the files of PEFT.

    Attributes:
        path: Its folder, or its hub id, as ``owner/name`` or ``owner/name@revision``. In a head
            set file, a folder is relative to the file.
        base_checksums: Digests of the weights on which it was trained, by
            `LocalModel.weights_checksum`. A model with other weights is refused, or there is a
            warning if its hub id is that of the head set.
        layers: Number of the model's layers that run; those above are dropped.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(min_length=1)
    base_checksums: tuple[str, ...]
    layers: Count

    def _read_from(self, folder: Path) -> Adapter:
        """Return the adapter as a head set file in ``folder`` means it."""
        path = folder / self.path
        if self.path.startswith("~") or (HUB_ID.fullmatch(self.path) and not path.is_dir()):
            return self
        return self.model_copy(update={"path": str(path.absolute())})

    def _written_to(self, folder: Path) -> Adapter:
        """Return the adapter as a head set file in ``folder`` names it."""
        adapter, folder = self._read_from(Path.cwd()), folder.absolute()
        path = Path(adapter.path)
        if path.is_relative_to(folder):
            return self.model_copy(update={"path": path.relative_to(folder).as_posix()})
        return adapter


class HeadSet(BaseModel):
    """The heads to read, for one model.

    Attributes:
        name: Name of the set, by which a shipped set is selected.
        model: Hub id of the model on which the heads were found.
        model_aliases: Other hub ids of the same weights.
        model_type: Architecture as in the model's ``config.json``; ``None`` if unknown.
        num_layers: Number of layers of the model; ``None`` if unknown.
        num_heads: Number of query heads per layer; ``None`` if unknown.
        heads: The heads that are read.
        template: Name of the prompt template with which the heads were found.
        default: Whether this is the default of the sets that are shipped for a model.
        scoring: How the heads rank: prompts, calibration, weight of the first stage.
        adapter: What changes the model's weights before the heads are read, if they were trained
            with one.
        provenance: How the heads were found.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "custom"
    model: str | None = None
    model_aliases: tuple[str, ...] = ()
    model_type: str | None = None
    num_layers: Count | None = None
    num_heads: Count | None = None
    heads: tuple[Head, ...] = Field(min_length=1)
    template: str | None = None
    default: bool = False
    scoring: ScoringConfig = ScoringConfig()
    adapter: Adapter | None = None
    provenance: Provenance = Provenance()

    @model_validator(mode="after")
    def _check(self) -> HeadSet:
        counts = Counter((head.layer, head.head) for head in self.heads)
        if repeated := sorted(pair for pair, count in counts.items() if count > 1):
            raise ValueError(f"heads listed twice: {repeated}")
        self._check_range(self.num_layers, self.num_heads)
        if self.adapter and self.highest_layer >= self.adapter.layers:
            raise ValueError(
                f"a head of layer {self.highest_layer} is out of range: the adapter keeps "
                f"{self.adapter.layers} layers, numbered from 0"
            )
        return self

    @classmethod
    def from_pairs(cls, pairs: Iterable[tuple[int, int]], **fields: Any) -> HeadSet:
        """Create a head set from (layer, head) pairs.

        Raises:
            HeadSetError: A pair is not two whole numbers, or is listed twice.
        """
        heads = []
        for pair in pairs:
            try:
                layer, head = pair
            except (TypeError, ValueError):
                raise HeadSetError(f"a head is a (layer, head) pair, got {pair!r}") from None
            heads.append({"layer": layer, "head": head})
        return cls.validated({"heads": heads, **fields}, "heads")

    @classmethod
    def every(cls, shape: ModelShape, max_layer: int | None = None, **fields: Any) -> HeadSet:
        """Create a head set of all heads of a model, up to and including ``max_layer``.

        Raises:
            HeadSetError: The model does not have this layer.
        """
        last = shape.num_layers - 1
        if max_layer is not None and not 0 <= max_layer <= last:
            raise HeadSetError(
                f"max_layer must be between 0 and {last}, the model's last layer, got {max_layer}"
            )
        layers = range((last if max_layer is None else max_layer) + 1)
        return cls(
            name="all",
            model_type=shape.model_type,
            num_layers=shape.num_layers,
            num_heads=shape.num_heads,
            heads=tuple(
                Head(layer=layer, head=head) for layer in layers for head in range(shape.num_heads)
            ),
            provenance=Provenance(method="icr"),
            **fields,
        )

    @classmethod
    def load(cls, path: str | Path) -> HeadSet:
        """Read a head set file.

        Supported are this package's own JSON; vLLM-Hook's model configs (``important_heads``);
        the CoRe release's ``{"layer-head": score}``, of which the best eight are taken; and
        QRHead's YAML (``attn_head_set``).

        Raises:
            HeadSetError: The file is missing, has another format, or has no valid heads.
        """
        file = expand_user(path)
        content = json.dumps(read_fields(file))
        # Files are strict: true is not the layer 1, and "0.5" is not a weight.
        loaded = cls._checked(partial(cls.model_validate_json, content, strict=True), str(path))
        adapter = loaded.adapter and loaded.adapter._read_from(file.parent)
        return loaded.model_copy(update={"adapter": adapter})

    def save(self, path: str | Path) -> None:
        """Write the set as JSON, one head per line.

        The folder of an adapter is written relative to the file if it lies beside or below it.

        Raises:
            StorageError: The file cannot be written.
        """
        file = expand_user(path)
        adapter = self.adapter and self.adapter._written_to(file.parent)
        written = self.model_copy(update={"adapter": adapter})
        fields = written.model_dump(mode="json", exclude_defaults=True)
        write_atomically(file, to_json(fields) + "\n")

    def top(self, count: int) -> HeadSet:
        """Return the set with the ``count`` best heads of its ranking.

        Raises:
            HeadSetError: The ranking holds fewer heads, or one above the adapter's layers.
        """
        ranked = self.provenance.ranked_heads
        if not 1 <= count <= len(ranked):
            raise HeadSetError(
                f"cannot take {count} heads of {self.name}: its ranking holds {len(ranked)}"
            )
        heads = HeadSet.from_ranking(ranked, count).heads
        name = f"{self.name}-top{count}"
        return self.validated({**dict(self), "heads": heads, "name": name}, name)

    @classmethod
    def from_ranking(
        cls, ranking: Sequence[tuple[int, int, float | None]], count: int, **fields: Any
    ) -> HeadSet:
        """Create a head set from the ``count`` first of (layer, head, score), best first."""
        heads = [
            {"layer": layer, "head": head, "score": score} for layer, head, score in ranking[:count]
        ]
        return cls.validated({"heads": heads, **fields}, "heads")

    def with_documents_per_prompt(self, count: int | None) -> HeadSet:
        """Return the set with another number of documents per prompt; ``None`` changes nothing.

        Calibration and abstention are dropped, because they hold only for the number they were
        fitted with.
        """
        if count in (None, self.scoring.documents_per_prompt):
            return self
        return self.with_scoring(documents_per_prompt=count, calibration=None, abstention=None)

    def with_scoring(self, **changes: Any) -> HeadSet:
        """Return the set with changes to its `ScoringConfig`.

        Raises:
            HeadSetError: A change is invalid.
        """
        scoring = {**self.scoring.model_dump(), **changes}
        return self.validated({**dict(self), "scoring": scoring}, f"{self.name} with {changes}")

    @property
    def kind(self) -> str:
        """First word of the name, by which a shipped set is selected for a model."""
        return self.name.partition("-")[0]

    @property
    def weights(self) -> Mass:
        """Weight of each head, shape [heads]."""
        return np.array([head.weight for head in self.heads], dtype=np.float32)

    @property
    def evidence_weights(self) -> Mass:
        """Evidence weight of each head, or its weight if none was fitted, shape [heads]."""
        return np.array(
            [
                head.weight if head.evidence_weight is None else head.evidence_weight
                for head in self.heads
            ],
            dtype=np.float32,
        )

    @property
    def by_layer(self) -> dict[int, list[tuple[int, int]]]:
        """For each layer, ascending, its heads as (head, index in this set)."""
        layers: dict[int, list[tuple[int, int]]] = {}
        for index, head in sorted(enumerate(self.heads), key=lambda item: item[1].layer):
            layers.setdefault(head.layer, []).append((head.head, index))
        return layers

    @property
    def highest_layer(self) -> int:
        """Index of the last layer that has to run."""
        return max(head.layer for head in self.heads)

    def check(self, model: str | None, shape: ModelShape) -> None:
        """Check that this set belongs to a model.

        Args:
            model: Hub id of the model, or ``None`` if it is unknown (a local folder).
            shape: Shape of the model.

        Raises:
            HeadSetError: The set was found on another model, or a head is out of range.
        """
        if self.model and model and model not in (self.model, *self.model_aliases):
            raise HeadSetError(
                f"the head set {self.name!r} was found on {self.model}, but the model is {model}. "
                "Heads do not carry over between models; to use them all the same (say, for a "
                "fine-tuned copy), pass heads=[(layer, head), ...]"
            )
        if self.model_type and self.model_type != shape.model_type:
            raise HeadSetError(
                f"the head set {self.name!r} was found on a model of type {self.model_type!r} "
                f"({self.model}), but this model is of type {shape.model_type!r}"
            )
        for label, expected, actual in (
            ("layers", self.num_layers, shape.num_layers),
            ("heads per layer", self.num_heads, shape.num_heads),
        ):
            if expected is not None and expected != actual:
                raise HeadSetError(
                    f"the head set {self.name!r} is for a model of {expected} {label} "
                    f"({self.model}), but this model has {actual}"
                )
        try:
            self._check_range(shape.num_layers, shape.num_heads)
        except ValueError as error:
            raise HeadSetError(f"the head set {self.name!r} does not fit: {error}") from None

    def _check_range(self, num_layers: int | None, num_heads: int | None) -> None:
        if num_layers is not None and self.adapter and self.adapter.layers > num_layers:
            raise ValueError(
                f"the adapter keeps {self.adapter.layers} layers, but the model has {num_layers}"
            )
        ranked = ((layer, head) for layer, head, _ in self.provenance.ranked_heads)
        for pair in (*((head.layer, head.head) for head in self.heads), *ranked):
            if num_layers is not None and pair[0] >= num_layers:
                raise ValueError(
                    f"head {pair} is out of range: the model has {num_layers} layers, "
                    "numbered from 0"
                )
            if num_heads is not None and pair[1] >= num_heads:
                raise ValueError(
                    f"head {pair} is out of range: a layer of the model has {num_heads} heads, "
                    "numbered from 0"
                )

    @classmethod
    def validated(cls, fields: Mapping[str, Any], source: str) -> HeadSet:
        """Create a head set from unchecked fields.

        Raises:
            HeadSetError: The fields are invalid; the message starts with ``source``.
        """
        return cls._checked(partial(cls.model_validate, fields), source)

    @classmethod
    def _checked(cls, validate: Callable[[], HeadSet], source: str) -> HeadSet:
        try:
            return validate()
        except ValidationError as error:
            problems = "; ".join(map(_problem, error.errors()))
            raise HeadSetError(f"{source} is not a usable head set: {problems}") from error


def _problem(item: ErrorDetails) -> str:
    """Return the key, the problem and the value of one of pydantic's errors."""
    key = ".".join(map(str, item["loc"])) or "head set"
    value = item["input"]
    got = "" if isinstance(value, HeadSet | Mapping) else f" ({shortened(value)})"
    return f"{key}: {item['msg'].removeprefix('Value error, ')}{got}"
