"""Head sets: which heads of a model are read, with which weights, and where that is known from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from core_rerank_integrations.errors import HeadSetError
from core_rerank_integrations.files import write_whole
from core_rerank_integrations.resources import resource_folder
from core_rerank_integrations.rule import RankingRule
from core_rerank_integrations.scoring import Mass


class ModelShape(NamedTuple):
    """What a head set must agree with: layers, query heads per layer, and the architecture."""

    num_layers: int
    num_heads: int
    model_type: str


class Head(BaseModel):
    """One attention head; both indices count from zero.

    Attributes:
        layer: The layer it lies in.
        head: Its place among the query heads of that layer.
        score: How well it told the relevant document from the others, where that is known.
        weight: Factor of its attention in the sum over heads.
        evidence: The same in the sum that tells a document's sentences apart; ``None`` where that
            was not fitted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int = Field(ge=0)
    head: int = Field(ge=0)
    score: float | None = None
    weight: float = Field(default=1.0, allow_inf_nan=False)
    evidence: float | None = Field(default=None, allow_inf_nan=False)


class Provenance(BaseModel):
    """Where a head set is known from.

    Attributes:
        method: How the heads were found: ``core``, ``qr``, ``icr``, ``fit`` or ``custom``.
        details: Source, data, temperature, licence and the like.
        ranked_heads: All heads that were looked at as (layer, head, score), best first, where
            that is known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = "custom"
    details: dict[str, JsonValue] = Field(default_factory=dict)
    ranked_heads: tuple[tuple[int, int, float | None], ...] = ()


class HeadSet(BaseModel):
    """The heads to read, for one model.

    Attributes:
        name: Under this name a shipped set can be asked for.
        model: Hub id of the model the heads were found on.
        model_aliases: Other hub ids of the same weights.
        model_type: Architecture as in the model's ``config.json``; ``None`` if unknown.
        num_layers: Layers of the model; ``None`` if unknown.
        num_heads: Query heads per layer of the model; ``None`` if unknown.
        heads: The heads that are read.
        template: Name of the prompt template the heads were found with.
        default: Whether it is the one to take where several are shipped for a model.
        rule: How they rank: documents a prompt, the first stage's weight, probabilities.
        provenance: How and on what they were found.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "custom"
    model: str | None = None
    model_aliases: tuple[str, ...] = ()
    model_type: str | None = None
    num_layers: int | None = Field(default=None, ge=1)
    num_heads: int | None = Field(default=None, ge=1)
    heads: tuple[Head, ...] = Field(min_length=1)
    template: str | None = None
    default: bool = False
    rule: RankingRule = RankingRule()
    provenance: Provenance = Provenance()

    @model_validator(mode="after")
    def _check(self) -> HeadSet:
        places = [(head.layer, head.head) for head in self.heads]
        if repeated := {place for place in places if places.count(place) > 1}:
            raise ValueError(f"heads listed twice: {sorted(repeated)}")
        self._check_range(self.num_layers, self.num_heads)
        return self

    @classmethod
    def from_pairs(cls, pairs: Iterable[tuple[int, int]], **fields: Any) -> HeadSet:
        """A head set from plain (layer, head) pairs.

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
        return cls._validated({"heads": heads, **fields}, "heads")

    @classmethod
    def every(cls, shape: ModelShape, max_layer: int | None = None, **fields: Any) -> HeadSet:
        """All heads of a model, layer by layer, up to and with ``max_layer``.

        Raises:
            HeadSetError: The model has no such layer.
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

        Besides this package's own JSON: vLLM-Hook's model configs (``important_heads``), the
        CoRe release's ``{"layer-head": score}``, of which the best eight are taken, and
        QRHead's YAML (``attn_head_set``).

        Raises:
            HeadSetError: The file is missing, is none of these, or names no usable heads.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            content = _parse_yaml(text) if path.suffix in {".yaml", ".yml"} else json.loads(text)
        except (OSError, ValueError) as error:
            raise HeadSetError(f"cannot read the head set {path}: {error}") from error
        if not isinstance(content, dict):
            raise HeadSetError(f"{path} holds no head set: expected an object at its top level")
        try:
            fields = _from_foreign(content, name=path.stem) or content
        except (TypeError, ValueError) as error:
            raise HeadSetError(f"{path} is not a usable head set: {error}") from error
        return cls._validated(fields, str(path))

    def save(self, path: str | Path) -> None:
        """Write the set as JSON, one head a line.

        Raises:
            StorageError: The file cannot be written.
        """
        fields = self.model_dump(mode="json", exclude_defaults=True)
        write_whole(Path(path), _json(fields) + "\n")

    def top(self, count: int) -> HeadSet:
        """The ``count`` best heads of the published ranking instead of the usual ones.

        Raises:
            HeadSetError: The ranking holds fewer heads than that.
        """
        ranked = self.provenance.ranked_heads
        if not 1 <= count <= len(ranked):
            raise HeadSetError(
                f"cannot take {count} heads of {self.name}: its ranking holds {len(ranked)}"
            )
        heads = HeadSet.from_ranking(ranked, count).heads
        return self.model_copy(update={"heads": heads, "name": f"{self.name}-top{count}"})

    @classmethod
    def from_ranking(
        cls, ranking: Sequence[tuple[int, int, float | None]], count: int, **fields: Any
    ) -> HeadSet:
        """The ``count`` best of (layer, head, score), best first."""
        heads = [
            {"layer": layer, "head": head, "score": score} for layer, head, score in ranking[:count]
        ]
        return cls._validated({"heads": heads, **fields}, "heads")

    def in_windows_of(self, size: int) -> HeadSet:
        """The same heads in prompts of ``size`` documents.

        What a score means as a probability is known for the size it was fitted for alone.
        """
        if size == self.rule.window:
            return self
        return self.with_rule(window=size, calibration=None, abstention=None)

    def with_rule(self, **changes: Any) -> HeadSet:
        """The same heads under a rule with ``changes``; see `RankingRule`."""
        rule = RankingRule.model_validate({**self.rule.model_dump(), **changes})
        return self.model_copy(update={"rule": rule})

    @property
    def kind(self) -> str:
        """What a shipped set is asked for by: the first word of its name."""
        return self.name.partition("-")[0]

    @property
    def weights(self) -> Mass:
        """What each head counts, shape [heads]."""
        return np.array([head.weight for head in self.heads], dtype=np.float32)

    @property
    def evidence_weights(self) -> Mass:
        """The same for evidence; where none were fitted, what heads count in the score."""
        return np.array(
            [head.weight if head.evidence is None else head.evidence for head in self.heads],
            dtype=np.float32,
        )

    @property
    def highest_layer(self) -> int:
        """The last layer that has to run."""
        return max(head.layer for head in self.heads)

    def check(self, model: str | None, shape: ModelShape) -> None:
        """Make sure this set can be read from that model.

        Args:
            model: Hub id of the model, or ``None`` where it is not known (a local folder).
            shape: What the model's configuration says.

        Raises:
            HeadSetError: The set was found on another model, or a head is out of range.
        """
        known = {self.model, *self.model_aliases}
        if self.model and model and model not in known:
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
        for head in self.heads:
            if num_layers is not None and head.layer >= num_layers:
                raise ValueError(
                    f"head {(head.layer, head.head)} is out of range: the model has "
                    f"{num_layers} layers, numbered from 0"
                )
            if num_heads is not None and head.head >= num_heads:
                raise ValueError(
                    f"head {(head.layer, head.head)} is out of range: a layer of the model has "
                    f"{num_heads} heads, numbered from 0"
                )

    @classmethod
    def _validated(cls, fields: Mapping[str, Any], source: str) -> HeadSet:
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, item['loc'])) or 'head set'}: {item['msg']}"
                + ("" if isinstance(item["input"], HeadSet | Mapping) else f" ({item['input']!r})")
                for item in error.errors()
            )
            raise HeadSetError(f"{source} is not a usable head set: {problems}") from error


PUBLISHED_CORE_HEADS = 8
"""How many heads arXiv 2510.02219 uses of its rankings."""


def _from_foreign(content: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """Fields of a `HeadSet` from another project's file; ``None`` if it is none of these."""
    params = content.get("params", content)
    if isinstance(params, Mapping) and "important_heads" in params:
        return {
            "name": name,
            "model": content.get("model_info", {}).get("model_id"),
            "heads": [{"layer": layer, "head": head} for layer, head in params["important_heads"]],
            "provenance": {"details": {"format": "vLLM-Hook important_heads"}},
        }
    if "attn_head_set" in content:
        return {
            "name": name,
            "model": content.get("model_name_or_path"),
            "heads": [_head_of(item) for item in content["attn_head_set"].split(",")],
            "provenance": {"method": "qr", "details": {"format": "QRHead attn_head_set"}},
        }
    if content and all(_is_layer_head(key) for key in content):
        ranking = sorted(content.items(), key=lambda item: -item[1])
        heads = [{**_head_of(key), "score": score} for key, score in ranking]
        return {
            "name": name,
            "heads": heads[:PUBLISHED_CORE_HEADS],
            "provenance": {
                "method": "core",
                "details": {"format": "CoRe release layer-head scores"},
                "ranked_heads": [(head["layer"], head["head"], head["score"]) for head in heads],
            },
        }
    return None


def _json(value: JsonValue, indent: str = "") -> str:
    """JSON with a line for each entry, and one for each head."""
    inner = f"{indent}  "
    if isinstance(value, dict):
        brackets = "{}"
        items = [f"{json.dumps(key)}: {_json(item, inner)}" for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        brackets = "[]"
        items = [json.dumps(item, ensure_ascii=False) for item in value]
    else:
        return json.dumps(value, ensure_ascii=False)
    lines = f",\n{inner}".join(items)
    return f"{brackets[0]}\n{inner}{lines}\n{indent}{brackets[1]}"


def _is_layer_head(key: str) -> bool:
    layer, _, head = key.partition("-")
    return layer.isdigit() and head.isdigit()


def _head_of(text: str) -> dict[str, Any]:
    layer, _, head = text.strip().partition("-")
    return {"layer": int(layer), "head": int(head)}


def _parse_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(error) from error


@cache
def shipped_head_sets() -> dict[str, HeadSet]:
    """The head sets inside this package, by name."""
    sets = [HeadSet.load(path) for path in sorted(resource_folder("model_configs").glob("*.json"))]
    return {head_set.name: head_set for head_set in sets}


def default_head_set(model: str | None) -> HeadSet:
    """The shipped head set for a hub id; of several, the one marked, else the first by name.

    Raises:
        HeadSetError: None is shipped for that model.
    """
    known_sets = [
        head_set
        for head_set in shipped_head_sets().values()
        if model is not None and model in (head_set.model, *head_set.model_aliases)
    ]
    if known_sets:
        return next((head_set for head_set in known_sets if head_set.default), known_sets[0])
    known = sorted({head_set.model or "" for head_set in shipped_head_sets().values()})
    raise HeadSetError(
        f"no head set is shipped for {model or 'a local model'}; pass heads=... (a HeadSet, the "
        f"path of a head set file, or a list of (layer, head)). Shipped: {', '.join(known)}"
    )


def named_head_set(name: str) -> HeadSet:
    """A head set by its shipped name, or from a file.

    Raises:
        HeadSetError: It is neither.
    """
    if name in shipped_head_sets():
        return shipped_head_sets()[name]
    if Path(name).exists():
        return HeadSet.load(name)
    raise HeadSetError(
        f"{name!r} is neither a head set file nor a shipped head set; "
        f"shipped: {', '.join(shipped_head_sets())}"
    )
