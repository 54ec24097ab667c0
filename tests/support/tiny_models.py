"""Tiny random models of every family, prompts for them, and what their heads attend to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig

from core_rerank_integrations import Head, HeadSet
from core_rerank_integrations.backends.base import AttentionBackend, PromptGroup
from core_rerank_integrations.method.prompt import SharedPrefix, Span
from core_rerank_integrations.models.local_model import LocalModel

VOCABULARY = 97
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"sliding_window": 12}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-3-rope": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral-sliding": ("MistralConfig", SLIDING),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-sliding": (
        "Qwen2Config",
        {**SLIDING, "use_sliding_window": True, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "granite": (
        "GraniteConfig",
        {"attention_multiplier": 0.7, "residual_multiplier": 0.5, "embedding_multiplier": 3.0},
    ),
    "phi3": ("Phi3Config", {"sliding_window": None}),
    "phi3-longrope": (
        "Phi3Config",
        {
            "sliding_window": None,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 4,
                "long_factor": [4.0, 3.0, 2.0, 1.5],
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma3": ("Gemma3TextConfig", {**SLIDING, "head_dim": 16, "query_pre_attn_scalar": 8}),
    # The last three of its layers have no keys of their own.
    "gemma4": (
        "Gemma4TextConfig",
        {
            **SLIDING,
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 3,
            "layer_types": [*["sliding_attention"] * 2, "full_attention"] * 2,
            "hidden_size_per_layer_input": 0,
            "head_dim": 16,
            "global_head_dim": 16,
        },
    ),
}

HEADS = HeadSet(
    heads=(
        Head(layer=0, head=1),
        Head(layer=2, head=0, weight=0.5),
        Head(layer=2, head=3),
        Head(layer=3, head=2, weight=-0.75),
    )
)


def saved(folder: Path, config: PretrainedConfig) -> LocalModel:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return LocalModel(folder, None)


def tiny(folder: Path, family: str) -> LocalModel:
    name, changes = FAMILIES[family]
    return saved(folder, getattr(transformers, name)(**{**TINY, **changes}))


def prefix(
    ids: np.ndarray[Any, Any], instruction: int, baseline: np.ndarray[Any, Any], documents: int = 1
) -> SharedPrefix:
    """Return a prefix of tokens without a text."""
    return SharedPrefix(ids, instruction, (Span(0, 1),) * documents, (), baseline)


def groups() -> list[PromptGroup]:
    """Return two questions about one prefix, one about a short prefix, one about a long one.

    The second prefix has no instruction.
    """
    generator = np.random.default_rng(0)

    def tokens(count: int) -> np.ndarray[Any, Any]:
        return generator.integers(3, VOCABULARY, count)

    shared, short, long = tokens(40), tokens(17), tokens(90)
    first, second, third, fourth = tokens(9), tokens(5), tokens(14), tokens(7)
    baseline = tokens(4)
    return [
        PromptGroup(
            prefix(np.concatenate((shared, first[:3])), 3, baseline), [first[3:], second[3:]]
        ),
        PromptGroup(prefix(short, 0, baseline), [third]),
        PromptGroup(prefix(np.concatenate((long, fourth[:6])), 6, baseline), [fourth[6:]]),
    ]


def expected(
    model: LocalModel, prefix: SharedPrefix, question: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """Compute the weighted attention mass of one question, by the whole model's eager attention."""
    eager = AutoModelForCausalLM.from_pretrained(
        model.path, attn_implementation="eager", dtype=torch.float32
    ).eval()
    tokens = torch.as_tensor(np.concatenate((prefix.ids, question)))[None]
    with torch.inference_mode():
        attentions = eager(tokens, output_attentions=True, use_cache=False).attentions
    start = prefix.context_length
    mass = sum(
        head.weight * attentions[head.layer][0, head.head, start:].mean(dim=0)
        for head in HEADS.heads
    )
    return mass[: start + 1].numpy()


def expected_masses(model: LocalModel, groups: Sequence[PromptGroup]) -> list[np.ndarray[Any, Any]]:
    """Compute the weighted mass of each group's baseline and questions, in order."""
    return [
        expected(model, group.prefix, question)
        for group in groups
        for question in (group.prefix.baseline, *group.questions)
    ]


def masses(backend: AttentionBackend, groups: Sequence[PromptGroup]) -> list[np.ndarray[Any, Any]]:
    """Compute the same with a backend, in the same order."""
    return [
        mass[0]
        for result in backend.attention_mass(groups, HEADS.weights[None])
        for mass in (result.baseline, *result.questions)
    ]


def assert_close(
    computed: Sequence[np.ndarray[Any, Any]],
    expected: Sequence[np.ndarray[Any, Any]],
    tolerance: float = 1e-6,
) -> None:
    for mass, other in zip(computed, expected, strict=True):
        np.testing.assert_allclose(mass, other, rtol=0, atol=tolerance)
