"""The Transformers backend: CPU or GPU, any machine.

All prompts of a call are packed into one sequence, what they share followed by each of its
questions, and go through the model in one forward pass without padding. What is the same whatever
is asked, documents and late instruction, is read once: its keys and values are kept, and the next
question about the same documents runs its own few tokens alone.

Which token sees which is decided in the attention function, so that no mask of Transformers' own
making is involved. Layers above the highest selected head are not built, and the forward pass ends
at that head's layer as soon as its queries and keys are known.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from core_rerank_integrations.backends.known_documents import (
    KnownDocuments,
    KnownOpening,
    TensorFile,
)
from core_rerank_integrations.backends.local import LocalBackend
from core_rerank_integrations.backends.prompt_groups import PromptGroup
from core_rerank_integrations.errors import (
    InvalidInputError,
    ModelError,
    UnsupportedModelError,
    requires_extra,
)
from core_rerank_integrations.heads import HeadSet
from core_rerank_integrations.models import LocalModel, first_layers
from core_rerank_integrations.scoring import Mass
from core_rerank_integrations.store import DocumentCache

with requires_extra("transformers"):
    import safetensors.torch
    import torch
    import torch.nn.functional as F
    from torch import Tensor
    from transformers import AttentionInterface, AutoModel, PretrainedConfig, PreTrainedModel

ATTENTION_NAME = "core_rerank"
KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}
LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
"""RoPE whose frequencies depend on the longest position of the whole forward pass."""
PROBED_ROWS = 128
"""Query rows whose attention over the prompt is held in memory at once, per head."""
NOTHING_KEPT = DocumentCache(memory_bytes=0, disk_bytes=0)
KEPT_FORMAT = 2
"""Counts up when what is kept of documents changes its meaning."""


class TransformersBackend(LocalBackend):
    """CoRe attention mass from a Hugging Face model.

    Args:
        model: The model's folder.
        head_set: The heads to read.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: bfloat16 where the GPU or the
            processor has it, else float16 on CUDA and float32 on CPU. Attention mass is float32
            always.
        device: A torch device, or ``None`` for CUDA where there is one, else CPU.
        max_batch_tokens: Tokens packed into one forward pass; a longer prompt runs alone.
            ``None``: 2,048 on CPU, where longer passes gain nothing, else 16,384.
        document_cache: How much is kept of the keys and values of documents that were read, and
            where; ``None`` for the defaults of `DocumentCache`.

    Raises:
        UnsupportedModelError: The model computes attention in a way that this backend cannot
            read exactly.
        HeadSetError: The head set does not belong to the model.
    """

    def __init__(
        self,
        model: LocalModel,
        head_set: HeadSet,
        *,
        dtype: str = "auto",
        device: str | None = None,
        max_batch_tokens: int | None = None,
        document_cache: DocumentCache | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = _dtype(dtype, self.device)
        self._max_batch_tokens = max_batch_tokens or (2048 if self.device.type == "cpu" else 16384)

        config = model.config()
        self.max_context: int = config.max_position_embeddings
        keeps = _rope_type(config) not in LENGTH_DEPENDENT_ROPE
        if not keeps:
            document_cache = NOTHING_KEPT
        heads = [(head.layer, head.head) for head in head_set.heads]
        known = KnownDocuments(
            document_cache or DocumentCache(),
            repr((KEPT_FORMAT, model.fingerprint(), str(self.dtype), heads)),
            TensorFile(_to_file, partial(_from_file, device=self.device)),
        )
        super().__init__(head_set, known, keeps)
        _check_layer_types(config, head_set.highest_layer + 1)
        for name, value in first_layers(config, head_set.highest_layer + 1).items():
            setattr(config, name, value)
        self._model = self._load(model, config)
        self._heads = _LayerHeads.by_layer(head_set, self.device)
        self._verify(model)

    def _load(self, model: LocalModel, config: PretrainedConfig) -> PreTrainedModel:
        try:
            with _without_load_report():
                loaded, report = AutoModel.from_pretrained(
                    model.path,
                    config=config,
                    dtype=self.dtype,
                    device_map={"": self.device},
                    attn_implementation=ATTENTION_NAME,
                    output_loading_info=True,
                )
        except (OSError, ValueError) as error:
            raise ModelError(f"Transformers cannot load {model.path}: {error}") from error
        if report["missing_keys"]:
            raise ModelError(
                f"{model.path} lacks weights of the model, so its scores would be random: "
                f"{', '.join(sorted(report['missing_keys'])[:5])} ..."
            )
        if not getattr(loaded, "_supports_attention_backend", False):
            raise UnsupportedModelError(
                f"{type(loaded).__name__} does not compute its attention through Transformers' "
                "AttentionInterface, so its heads cannot be read"
            )
        return loaded.eval()

    def _verify(self, model: LocalModel) -> None:
        """Compare a tiny prompt with the model's own eager attention, or refuse the model."""
        vocabulary = self._model.config.vocab_size
        tokens = (np.arange(1, 44) * 7919) % vocabulary
        opening, questions, rows = tokens[:24], [tokens[24:36], tokens[36:]], 5
        group = PromptGroup(opening, rows, questions)
        (probed,) = self._forward([group], keep=False)
        tolerance = 1e-3 if self.dtype == torch.float32 else 5e-2
        for question, mass in zip(questions, probed, strict=True):
            expected = self._eager_mass(np.concatenate((opening, question)), rows + len(question))
            difference = float(np.abs(mass - expected).max())
            if not difference <= tolerance:
                raise UnsupportedModelError(
                    f"{model.path}: attention read from {type(self._model).__name__} differs from "
                    f"the model's own by {difference:.2g}; this architecture computes attention "
                    "in a way that this package does not know"
                )

    def _eager_mass(self, tokens: np.ndarray[Any, Any], rows: int) -> Mass:
        self._model.set_attn_implementation("eager")
        try:
            with torch.inference_mode():
                output = self._model(
                    input_ids=torch.as_tensor(tokens, device=self.device)[None],
                    use_cache=False,
                    output_attentions=True,
                )
        finally:
            self._model.set_attn_implementation(ATTENTION_NAME)
        mass = torch.zeros(len(self._weights), len(tokens), device=self.device)
        for layer, heads in self._heads.items():
            attention = output.attentions[layer][0, heads.indices, -rows:].float()
            mass[heads.places] = attention.mean(dim=1)
        return mass.cpu().numpy()

    def _free(self) -> None:
        del self._model
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _fits(self, groups: Sequence[PromptGroup]) -> bool:
        return self._keeps and sum(group.tokens for group in groups) <= self._max_batch_tokens

    def _forward(self, groups: Sequence[PromptGroup], keep: bool) -> list[list[Mass]]:
        stretches: list[_Stretch] = []
        tokens: list[np.ndarray[Any, Any]] = []
        positions: list[np.ndarray[Any, Any]] = []
        start = 0
        for group in groups:
            stretch = _Stretch(start, group, self._heads, keep, self.device)
            stretches.append(stretch)
            border = len(group.opening)
            if group.known is None:
                tokens.append(group.opening)
                positions.append(np.arange(border))
            tokens += group.questions
            positions += (np.arange(border, border + len(asked)) for asked in group.questions)
            start = stretch.stop
        probe = _Probe(stretches, self._heads)
        with torch.inference_mode():
            try:
                self._model(
                    input_ids=torch.as_tensor(np.concatenate(tokens), device=self.device)[None],
                    position_ids=torch.as_tensor(np.concatenate(positions), device=self.device)[
                        None
                    ],
                    use_cache=False,
                    core_probe=probe,
                )
            except _LastHeadReached:
                if keep:
                    for group, stretch in zip(groups, stretches, strict=True):
                        group.known = stretch.known
                        self._known.keep(group.key, stretch.known)
                return [stretch.masses() for stretch in stretches]
        raise UnsupportedModelError(
            f"{type(self._model).__name__} never called attention in layer {max(self._heads)}"
        )


class _LayerHeads(NamedTuple):
    """The selected heads of one layer, and their places in the head set."""

    indices: Tensor
    places: Tensor

    @classmethod
    def by_layer(cls, head_set: HeadSet, device: torch.device) -> dict[int, _LayerHeads]:
        by_layer: dict[int, list[tuple[int, int]]] = {}
        for place, head in enumerate(head_set.heads):
            by_layer.setdefault(head.layer, []).append((head.head, place))
        return {
            layer: cls(*torch.tensor(by_layer[layer], device=device).unbind(dim=1))
            for layer in sorted(by_layer)
        }


class _Stretch:
    """Where a group lies in the packed sequence, and what is found out about it."""

    def __init__(
        self,
        start: int,
        group: PromptGroup,
        heads: dict[int, _LayerHeads],
        keep: bool,
        device: torch.device,
    ) -> None:
        count = sum(len(layer.indices) for layer in heads.values())
        length = len(group.opening)
        self.is_new = group.known is None
        self.keep = keep
        self.rows = group.rows
        self.known = group.known or KnownOpening(torch.zeros(count, length, device=device))
        self.start = start
        self.border = start + (length if self.is_new else 0)
        self.questions: list[tuple[int, int]] = []
        self._sums: list[Tensor] = []
        self.stop = self.border
        for question in group.questions:
            self.questions.append((self.stop, self.stop + len(question)))
            self._sums.append(torch.zeros(count, length + len(question), device=device))
            self.stop += len(question)

    def add(self, question: int, places: Tensor, sums: Tensor) -> None:
        """Keep the attention of one question's rows, summed over them, of some heads."""
        self._sums[question][places] = sums

    def masses(self) -> list[Mass]:
        """Mean attention of the whole query span, per question."""
        masses = []
        for (begin, stop), sums in zip(self.questions, self._sums, strict=True):
            sums[:, : self.known.mass.shape[1]] += self.known.mass
            masses.append((sums / (self.rows + stop - begin)).cpu().numpy())
        return masses


class _LastHeadReached(Exception):  # noqa: N818  It is no error.
    """Leaves the forward pass: nothing after the highest head's queries and keys is needed."""


class _Probe:
    """Collects attention mass while one forward pass goes by."""

    def __init__(self, stretches: Sequence[_Stretch], heads: dict[int, _LayerHeads]) -> None:
        self._stretches = stretches
        self._heads = heads
        self._last_layer = max(heads)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Attention output of a layer, shape [heads, tokens, value size], mass kept on the way.

        Args:
            layer: Index of the layer.
            query: Shape [heads, tokens, head size]; rotary embedding applied, as for ``key``.
            key: Shape [key heads, tokens, head size].
            value: Shape [key heads, tokens, value size].
            scale: Factor of the attention logits.
            window: Tokens a token sees, itself included; ``None`` for all before it.
        """
        heads = self._heads.get(layer)
        last = layer == self._last_layer
        output = None if last else query.new_empty(*query.shape[:2], value.shape[-1])
        for stretch in self._stretches:
            start, border, known = stretch.start, stretch.border, stretch.known
            if stretch.is_new:
                keys, values = key[:, start:border], value[:, start:border]
                asking = query[:, start:border]
                if heads is not None and stretch.rows:
                    known.mass[heads.places] = _mass(
                        asking[:, -stretch.rows :], keys, heads, scale=scale, window=window
                    )
                if output is not None:
                    output[:, start:border] = _causal_attention(
                        asking, keys, values, scale=scale, window=window
                    )
                if stretch.keep:  # Copies: the pass's own tensors hold all stretches.
                    known.states.append(keys.clone())
                    if not last:
                        known.states.append(values.clone())
            else:
                keys = known.states[2 * layer]
                values = value if last else known.states[2 * layer + 1]
            for question, (begin, stop) in enumerate(stretch.questions):
                outputs, sums = _continued_attention(
                    query[:, begin:stop],
                    (keys, key[:, begin:stop]),
                    None if last else (values, value[:, begin:stop]),
                    heads,
                    scale=scale,
                    window=window,
                )
                if output is not None and outputs is not None:
                    output[:, begin:stop] = outputs
                if heads is not None and sums is not None:
                    stretch.add(question, heads.places, sums)
        if output is None:
            raise _LastHeadReached
        return output


def _probed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001  Part of the interface; zero in evaluation.
    sliding_window: int | None = None,
    core_probe: _Probe | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface; tensors come as [batch, heads, tokens, head size]."""
    name = type(module).__name__
    if core_probe is None:
        raise UnsupportedModelError(f"{name} does not hand keyword arguments to its attention")
    for argument, meaning in (
        ("softcap", "soft-caps its attention logits"),
        ("s_aux", "has attention sinks"),
        ("position_bias", "adds a position bias to its attention logits"),
    ):
        if kwargs.get(argument) is not None:
            raise UnsupportedModelError(
                f"{name} {meaning}, which the Transformers backend does not read"
            )
    if attention_mask is not None:
        raise UnsupportedModelError(f"{name} makes an attention mask of its own")
    output = core_probe.attend(
        int(module.layer_idx),  # type: ignore[arg-type]
        query[0],
        key[0],
        value[0],
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
    )
    return output.transpose(0, 1)[None], None


# No mask function is registered under this name: Transformers then makes no masks, and a model
# that makes its own is refused above.
AttentionInterface.register(ATTENTION_NAME, _probed_attention)


def _causal_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
) -> Tensor:
    """Attention of the last ``query.shape[1]`` tokens of a stretch over all of it."""
    rows, tokens = query.shape[1], key.shape[1]
    if window is None or tokens <= window:
        if rows == tokens:
            return _sdpa(query, key, value, scale)
        return _sdpa(query, key, value, scale, _visible(rows, 0, tokens, window, query.device))
    # Stripes of rows keep a sliding window's cost linear in the length of the prompt.
    outputs = []
    for row in range(0, rows, window):
        last_row = min(row + window, rows)
        last_key = tokens - rows + last_row
        first_key = max(0, tokens - rows + row - window + 1)
        mask = _visible(last_row - row, first_key, last_key, window, query.device)
        outputs.append(
            _sdpa(
                query[:, row:last_row],
                key[:, first_key:last_key],
                value[:, first_key:last_key],
                scale,
                mask,
            )
        )
    return torch.cat(outputs, dim=1)


def _continued_attention(
    query: Tensor,
    keys: tuple[Tensor, Tensor],
    values: tuple[Tensor, Tensor] | None,
    heads: _LayerHeads | None,
    *,
    scale: float,
    window: int | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Attention of a question's tokens over an opening and over themselves.

    Written out, since a question has few rows, and neither the keys nor the values of the opening
    have to be copied for it.

    Args:
        query: Shape [heads, question tokens, head size].
        keys: Of the opening and of the question, each [key heads, tokens, head size].
        values: The same of values; ``None`` where no output is needed.
        heads: The selected heads of the layer, if any.
        scale: Factor of the attention logits.
        window: Tokens a token sees, itself included; ``None`` for all before it.

    Returns:
        The output, [heads, question tokens, value size]; and the attention of the selected heads,
        float32, summed over the question, [selected heads, all tokens].
    """
    old, new = (part.float().transpose(1, 2)[:, None] for part in keys)
    key_heads, opening, asked = len(old), old.shape[-1], query.shape[1]
    tokens = opening + asked
    grouped = query.float().view(key_heads, -1, asked, query.shape[2])
    visible = _visible(asked, 0, tokens, window, query.device)
    outputs: list[Tensor] = []
    sums = None if heads is None else query.new_zeros(len(heads.indices), tokens).float()
    for row in range(0, asked, PROBED_ROWS):
        rows = grouped[:, :, row : row + PROBED_ROWS]
        logits = torch.cat((rows @ old, rows @ new), dim=-1) * scale
        hidden = ~visible[row : row + PROBED_ROWS]
        attention = logits.masked_fill_(hidden, float("-inf")).softmax(dim=-1)
        if heads is not None and sums is not None:
            sums += attention.flatten(0, 1)[heads.indices].sum(dim=1)
        if values is not None:
            before, own = (part.float()[:, None] for part in values)
            output = attention[..., :opening] @ before + attention[..., opening:] @ own
            outputs.append(output.flatten(0, 1))
    return torch.cat(outputs, dim=1).to(query.dtype) if outputs else None, sums


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None
) -> Tensor:
    groups = query.shape[0] // key.shape[0]
    if mask is not None and groups > 1:
        # With a mask, grouped heads would fall back to the slow kernel on CUDA.
        key, value = (tensor.repeat_interleave(groups, dim=0) for tensor in (key, value))
        groups = 1
    return F.scaled_dot_product_attention(
        query[None],
        key[None],
        value[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=groups > 1,
    )[0]


def _visible(
    rows: int, first_key: int, last_key: int, window: int | None, device: torch.device
) -> Tensor:
    """Which keys ``first_key … last_key - 1`` each of the last ``rows`` of them sees."""
    row = torch.arange(last_key - rows, last_key, device=device)[:, None]
    column = torch.arange(first_key, last_key, device=device)[None]
    visible = column <= row
    return visible if window is None else visible & (column > row - window)


def _mass(
    query: Tensor, key: Tensor, heads: _LayerHeads, *, scale: float, window: int | None
) -> Tensor:
    """Attention of the selected heads, summed over rows: float32, [heads, tokens of ``key``]."""
    rows, tokens = query.shape[1], key.shape[1]
    groups = query.shape[0] // key.shape[0]
    keys = key[heads.indices // groups].float().transpose(1, 2)
    mass = torch.zeros(len(heads.indices), tokens, device=query.device)
    for row in range(0, rows, PROBED_ROWS):
        chunk = query[heads.indices, row : row + PROBED_ROWS].float()
        last_key = tokens - rows + row + chunk.shape[1]
        logits = (chunk @ keys[..., :last_key]) * scale
        visible = _visible(chunk.shape[1], 0, last_key, window, query.device)
        attention = logits.masked_fill_(~visible, float("-inf")).softmax(dim=-1)
        mass[:, :last_key] += attention.sum(dim=1)
    return mass


def _check_layer_types(config: PretrainedConfig, num_layers: int) -> None:
    layer_types = set((getattr(config, "layer_types", None) or [])[:num_layers])
    if unknown := layer_types - KNOWN_LAYER_TYPES:
        raise UnsupportedModelError(
            f"models of type {config.model_type!r} have layers of type "
            f"{', '.join(sorted(unknown))}, which hold no heads that can be read"
        )


def _rope_type(config: PretrainedConfig) -> str:
    parameters = getattr(config, "rope_parameters", None) or {}
    return str(parameters.get("rope_type", "default"))


def _dtype(name: str, device: torch.device) -> torch.dtype:
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name in dtypes:
        return dtypes[name]
    if name != "auto":
        raise InvalidInputError(f"dtype must be 'auto' or one of {', '.join(dtypes)}, got {name!r}")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if device.type == "cpu" and _has_bfloat16() else torch.float32


def _has_bfloat16() -> bool:
    """Whether the processor multiplies in bfloat16; where it only could, float32 is faster."""
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in asked)


def _to_file(tensors: dict[str, Any]) -> bytes:
    content: bytes = safetensors.torch.save(
        {name: torch.as_tensor(tensor).contiguous() for name, tensor in tensors.items()}
    )
    return content


def _from_file(content: bytes, device: torch.device) -> dict[str, Any]:
    return {
        name: tensor if name.startswith("answer.") else tensor.to(device)
        for name, tensor in safetensors.torch.load(content).items()
    }


@contextmanager
def _without_load_report() -> Iterator[None]:
    # Weights of the dropped layers are left over by design; missing ones are checked for.
    logger = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
