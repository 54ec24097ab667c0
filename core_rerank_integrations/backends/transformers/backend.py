"""The Transformers backend: CPUs and GPUs.

All prefixes and questions of a pass are packed into one sequence without padding. Which token sees
which is decided in the attention function, so no mask of Transformers is used. Layers above the
highest selected head are not built, and the forward pass ends at that head's layer as soon as its
queries and keys are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from core_rerank_integrations.backends.local.backend import LocalBackend, PrefixRun
from core_rerank_integrations.backends.local.prefix_cache import PrefixCache, TensorFormat
from core_rerank_integrations.errors import ModelError, UnsupportedModelError, requires_extra
from core_rerank_integrations.heads.head_set import HeadSet
from core_rerank_integrations.method.prompt import SharedPrefix, TokenIds
from core_rerank_integrations.method.scoring import Mass
from core_rerank_integrations.models.local_model import (
    LocalModel,
    truncated_config,
    without_load_report,
)
from core_rerank_integrations.settings import DocumentCache

with requires_extra("transformers"):
    import safetensors.torch
    import torch
    from transformers import AutoModel, PretrainedConfig, PreTrainedModel

    from core_rerank_integrations.backends.transformers.attention import LayerHeads
    from core_rerank_integrations.backends.transformers.checks import (
        check_fork,
        check_layer_types,
        rope_depends_on_length,
        torch_dtype,
    )
    from core_rerank_integrations.backends.transformers.packing import (
        ATTENTION_NAME,
        LastHeadReached,
        PackedSequence,
    )

NO_CACHE = DocumentCache(memory_bytes=0, disk_bytes=0)
CACHE_FORMAT = 4
"""Increased when the meaning of cached prefixes changes."""


class TransformersBackend(LocalBackend):
    """Compute attention mass with a Hugging Face model.

    Args:
        model: Folder of the model.
        head_set: The heads to read.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: bfloat16 if the GPU or the
            processor supports it, else float16 on CUDA and float32 on CPU. Attention mass is
            always float32.
        device: A torch device; ``None`` for CUDA if available, else the CPU.
        max_batch_tokens: Maximum number of tokens in a pass; a longer prompt runs alone. ``None``:
            2,048 on CPU, where longer passes gain nothing, else 16,384.
        document_cache: Size and folder of the cache; ``None`` for the defaults.

    Keys and values are rounded to eight bits, with a scale per token and key head, before any
    token attends to them. They are cached as such, so a score does not depend on whether a
    document was cached. With ``dtype="float32"`` they stay exact.

    Raises:
        UnsupportedModelError: The model's attention cannot be read exactly.
        InvalidInputError: The dtype is unknown.
        ModelError: The model cannot be loaded, or weights are missing.
        BackendError: The process is a fork of one that has used PyTorch's threads.
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
        check_fork(self.device)
        self.dtype = torch_dtype(dtype, self.device)
        self._max_batch_tokens = max_batch_tokens or (2048 if self.device.type == "cpu" else 16384)
        config = model.config()
        self.max_context: int = config.max_position_embeddings
        can_cache = not rope_depends_on_length(config)
        self._rounds_states = can_cache and dtype != "float32"
        heads = [(head.layer, head.head) for head in head_set.heads]
        cache = PrefixCache(
            (document_cache or DocumentCache()) if can_cache else NO_CACHE,
            repr((CACHE_FORMAT, model.fingerprint(), str(self.dtype), self._rounds_states, heads)),
            TensorFormat(_to_file, partial(_from_file, device=self.device)),
        )
        super().__init__(cache, can_cache)
        check_layer_types(config, head_set.highest_layer + 1)
        for name, value in truncated_config(config, head_set.highest_layer + 1).items():
            setattr(config, name, value)
        self._model = self._load(model, config)
        self._heads = LayerHeads.by_layer(head_set, self.device)
        self._verify(model)

    def _load(self, model: LocalModel, config: PretrainedConfig) -> PreTrainedModel:
        try:
            with without_load_report():
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
        """Compare a tiny prompt with the model's own eager attention.

        Raises:
            UnsupportedModelError: They differ.
        """
        tokens = (np.arange(1, 44) * 7919) % self._model.config.vocab_size
        questions = [tokens[24:36], tokens[36:]]
        prefix = SharedPrefix(tokens[:24], 5, (), (), questions[0])
        # Rounding of states is not the model's, and may move much attention of random tokens.
        (computed,) = self._forward([PrefixRun(prefix, questions)], keep=False, rounds=False)
        tolerance = 3e-4 if self.dtype == torch.float32 else 5e-2
        for question, mass in zip(questions, computed, strict=True):
            rows = prefix.instruction_length + len(question)
            expected = self._eager_mass(np.concatenate((prefix.ids, question)), rows)
            # Of a head: in lower precision, single tokens may differ by more.
            difference = float(np.sqrt(((mass - expected) ** 2).mean(axis=1)).max())
            if not difference <= tolerance:
                raise UnsupportedModelError(
                    f"{model.path}: attention read from {type(self._model).__name__} differs from "
                    f"the model's own by {difference:.2g}; this architecture computes attention "
                    "in a way that this package does not support"
                )

    def _eager_mass(self, tokens: TokenIds, rows: int) -> Mass:
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
        heads = sum(len(layer.heads) for layer in self._heads.values())
        mass = torch.zeros(heads, len(tokens), dtype=torch.float32, device=self.device)
        for index, layer in self._heads.items():
            attention = output.attentions[index][0, layer.heads, -rows:].float()
            mass[layer.indices] = attention.mean(dim=1)
        return mass.cpu().numpy()

    def _free(self) -> None:
        del self._model
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _fits(self, runs: Sequence[PrefixRun]) -> bool:
        return self._can_cache and sum(run.tokens for run in runs) <= self._max_batch_tokens

    def _forward(
        self, runs: Sequence[PrefixRun], keep: bool, rounds: bool | None = None
    ) -> list[list[Mass]]:
        rounds = self._rounds_states if rounds is None else rounds
        sequence = PackedSequence(runs, self._heads, keep, rounds, self.device)
        with torch.inference_mode():
            try:
                self._model(
                    input_ids=sequence.tokens[None],
                    position_ids=sequence.positions[None],
                    use_cache=False,
                    core_sequence=sequence,
                )
            except LastHeadReached:
                if keep:
                    for run, packed in zip(runs, sequence.runs, strict=True):
                        run.cached = packed.cached
                return [packed.masses() for packed in sequence.runs]
        raise UnsupportedModelError(
            f"{type(self._model).__name__} never called attention in layer {max(self._heads)}"
        )


def _to_file(tensors: dict[str, Any]) -> bytes:
    content: bytes = safetensors.torch.save(
        {name: torch.as_tensor(tensor).contiguous() for name, tensor in tensors.items()}
    )
    return content


def _from_file(content: bytes, device: torch.device) -> dict[str, Any]:
    return {
        name: tensor if name == "baseline_mass" else tensor.to(device)
        for name, tensor in safetensors.torch.load(content).items()
    }
