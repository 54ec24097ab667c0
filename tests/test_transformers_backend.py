"""Attention mass on tiny random models of every family, against Transformers' eager attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from core_rerank_integrations import DocumentCache, Head, HeadSet
from core_rerank_integrations.backends.transformers import TransformersBackend
from core_rerank_integrations.errors import (
    ClosedError,
    InvalidInputError,
    ModelError,
    StorageError,
    UnsupportedModelError,
)
from core_rerank_integrations.models import LocalModel
from core_rerank_integrations.prompt import Prompt, Span
from core_rerank_integrations.scoring import Mass

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


def prompts() -> list[Prompt]:
    """Two suffixes over one prefix, one alone over another, one asked twice, a long one.

    The first two begin alike, as with an instruction before the question.
    """
    generator = np.random.default_rng(0)

    def tokens(count: int) -> np.ndarray[Any, Any]:
        return generator.integers(3, VOCABULARY, count)

    shared, alone, long = tokens(40), tokens(17), tokens(90)
    suffixes = [tokens(9), tokens(5), tokens(14), tokens(7)]
    suffixes[1][:3] = suffixes[0][:3]
    pairs = [(shared, suffixes[0]), (alone, suffixes[2]), (shared, suffixes[1])]
    pairs += [(long, suffixes[3]), (shared, suffixes[0])]
    instructions = (3, 0, 3, 6, 3)
    return [
        Prompt(prefix, suffix, (Span(0, 1),), instruction)
        for (prefix, suffix), instruction in zip(pairs, instructions, strict=True)
    ]


def expected(model: LocalModel, prompt: Prompt) -> np.ndarray[Any, Any]:
    """The whole model, one prompt, every attention weight."""
    eager = AutoModelForCausalLM.from_pretrained(model.path, attn_implementation="eager").eval()
    tokens = torch.as_tensor(np.concatenate((prompt.prefix, prompt.suffix)))[None]
    with torch.inference_mode():
        attentions = eager(tokens, output_attentions=True, use_cache=False).attentions
    mass = sum(
        head.weight * attentions[head.layer][0, head.head, len(prompt.prefix) :].mean(dim=0)
        for head in HEADS.heads
    )
    return mass[: len(prompt.prefix) + 1].numpy()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_batch_tokens", [1, 8192])
def test_attention_mass(family: str, max_batch_tokens: int, tmp_path: Path) -> None:
    model = tiny(tmp_path, family)
    backend = TransformersBackend(model, HEADS, max_batch_tokens=max_batch_tokens)
    for _ in ("new documents", "known documents"):
        for prompt, mass in zip(prompts(), backend.attention_mass(prompts()), strict=True):
            assert mass.dtype == np.float32
            np.testing.assert_allclose(mass, expected(model, prompt), rtol=0, atol=2e-6)


def test_of_known_documents_the_question_runs_alone(tmp_path: Path) -> None:
    backend = TransformersBackend(tiny(tmp_path, "llama"), HEADS)
    ran: list[int] = []
    backend._model.layers[0].register_forward_hook(
        lambda _, arguments, __: ran.append(arguments[0].shape[1])
    )
    first, alone, second, *_ = prompts()
    (expected_mass,) = backend.attention_mass([second])
    backend.attention_mass([first])
    backend.attention_mass([alone, second])
    assert ran == [40 + 5, 9 - 3, 17 + 14 + 5 - 3]
    (again,) = backend.attention_mass([second])
    np.testing.assert_allclose(again, expected_mass, rtol=0, atol=1e-6)
    backend.forget()
    backend.attention_mass([second])
    assert ran[-1] == 40 + 5, "read anew"


def test_the_memory_of_known_documents_is_bounded(tmp_path: Path) -> None:
    model = tiny(tmp_path, "llama")
    expected_masses = TransformersBackend(model, HEADS).attention_mass(prompts())
    sizes = []
    for limit in (0, 40_000, 1 << 30):
        backend = TransformersBackend(
            model, HEADS, document_cache=DocumentCache(memory_bytes=limit)
        )
        for _ in range(2):
            masses = backend.attention_mass(prompts())
            for mass, other in zip(masses, expected_masses, strict=True):
                np.testing.assert_allclose(mass, other, rtol=0, atol=1e-6)
        sizes.append((len(backend._known), backend._known.size))
    assert sizes[0] == (0, 0)
    assert sizes[1][0] in (1, 2)
    assert sizes[1][1] <= 40_000
    tokens = (40 + 3) + 17 + (90 + 6)
    keys_and_values = (4 + 3) * 2 * 8 * 4  # Layers, key heads, head size, bytes.
    assert sizes[2] == (3, tokens * (keys_and_values + len(HEADS.heads) * 4))


def openings_run(backend: TransformersBackend, asked: list[Prompt]) -> tuple[list[Mass], int]:
    """Masses, and how many tokens had to run for them."""
    ran: list[int] = []
    hook = backend._model.layers[0].register_forward_hook(
        lambda _, arguments, __: ran.append(arguments[0].shape[1])
    )
    masses = backend.attention_mass(asked)
    hook.remove()
    return masses, sum(ran)


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_remembered_documents_come_from_disk(family: str, dtype: str, tmp_path: Path) -> None:
    model = tiny(tmp_path / "model", family)
    plain = TransformersBackend(model, HEADS, dtype=dtype).attention_mass(prompts())
    cache = DocumentCache(folder=tmp_path / "documents")
    assert TransformersBackend(model, HEADS, dtype=dtype, document_cache=cache).remember(prompts())
    for memory in (0, 1 << 30):
        cache = cache.model_copy(update={"memory_bytes": memory})
        later = TransformersBackend(model, HEADS, dtype=dtype, document_cache=cache)
        masses, ran = openings_run(later, prompts())
        assert ran == sum({len(p.suffix) - p.instruction for p in prompts()})
        for mass, expected_mass in zip(masses, plain, strict=True):
            tolerance = 1e-6 if dtype == "float32" else 1e-2
            np.testing.assert_allclose(mass, expected_mass, rtol=0, atol=tolerance)


def test_another_model_is_never_answered_from_what_is_kept(tmp_path: Path) -> None:
    model = tiny(tmp_path / "model", "llama")
    cache = DocumentCache(folder=tmp_path / "documents")
    asked = prompts()[:1]
    everything = len(asked[0])
    TransformersBackend(model, HEADS, document_cache=cache).remember(asked)

    def ran(heads: HeadSet = HEADS, dtype: str = "float32") -> int:
        backend = TransformersBackend(model, heads, dtype=dtype, document_cache=cache)
        return openings_run(backend, asked)[1]

    assert ran() < everything
    assert ran(dtype="bfloat16") == everything
    assert ran(HeadSet.from_pairs([(0, 1), (3, 2)])) == everything
    reweighted = [head.model_copy(update={"weight": 9.0}) for head in HEADS.heads]
    assert ran(HEADS.model_copy(update={"heads": tuple(reweighted)})) < everything
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(model.path)
    AutoModelForCausalLM.from_config(config).save_pretrained(model.path)
    assert ran() == everything


def test_a_store_too_small_says_so_and_gives_right_scores(tmp_path: Path) -> None:
    model = tiny(tmp_path / "model", "llama")
    plain = TransformersBackend(model, HEADS).attention_mass(prompts())
    sizes = TransformersBackend(
        model, HEADS, document_cache=DocumentCache(folder=tmp_path / "large")
    ).remember(prompts())
    small = DocumentCache(folder=tmp_path / "small", disk_bytes=sizes * 3 // 4, memory_bytes=0)
    backend = TransformersBackend(model, HEADS, document_cache=small)
    with pytest.warns(UserWarning, match=r"remembered documents were dropped.*disk_bytes"):
        backend.remember(prompts())
    for mass, expected_mass in zip(backend.attention_mass(prompts()), plain, strict=True):
        np.testing.assert_allclose(mass, expected_mass, rtol=0, atol=1e-6)
    tiny_store = DocumentCache(folder=tmp_path / "tiny", disk_bytes=100)
    with pytest.raises(StorageError, match="raise DocumentCache"):
        TransformersBackend(model, HEADS, document_cache=tiny_store).remember(prompts())
    (tmp_path / "file").touch()
    no_folder = DocumentCache(folder=tmp_path / "file")
    with pytest.raises(StorageError, match="cannot write"):
        TransformersBackend(model, HEADS, document_cache=no_folder).remember(prompts())


def test_layers_above_the_highest_head_are_not_built(tmp_path: Path) -> None:
    backend = TransformersBackend(tiny(tmp_path, "llama"), HEADS)
    assert backend._model.config.num_hidden_layers == 4
    assert len(backend._model.layers) == 4
    names = [name for name, _ in backend._model.named_parameters()]
    assert not any("lm_head" in name or "layers.4" in name for name in names)


def test_nothing_runs_after_the_last_queries_and_keys(tmp_path: Path) -> None:
    backend = TransformersBackend(tiny(tmp_path, "llama"), HEADS)
    ran = []
    for name, module in backend._model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    backend.attention_mass(prompts()[:1])
    assert "layers.3.self_attn.k_proj" in ran
    assert "layers.2.mlp" in ran
    assert not {"layers.3.self_attn.o_proj", "layers.3.mlp", "norm"} & set(ran)


def test_embeddings_of_all_layers_in_one_matrix_cannot_be_cut(tmp_path: Path) -> None:
    name, changes = FAMILIES["gemma4"]
    changes = {**TINY, **changes, "hidden_size_per_layer_input": 8}
    config = getattr(transformers, name)(**changes, vocab_size_per_layer_input=VOCABULARY)
    model = saved(tmp_path, config)
    with pytest.raises(UnsupportedModelError, match=r"gemma4_text.*in one matrix"):
        TransformersBackend(model, HEADS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close(dtype: str, tmp_path: Path) -> None:
    model = tiny(tmp_path, "qwen3")
    backend = TransformersBackend(model, HEADS, dtype=dtype)
    assert next(backend._model.parameters()).dtype == getattr(torch, dtype)
    for prompt, mass in zip(prompts(), backend.attention_mass(prompts()), strict=True):
        assert mass.dtype == np.float32
        np.testing.assert_allclose(mass, expected(model, prompt), rtol=0, atol=5e-2)


def test_one_model_serves_two_head_sets(tmp_path: Path) -> None:
    """Nothing global remembers the first."""
    model = tiny(tmp_path, "llama")
    other = HeadSet.from_pairs([(1, 1)])
    first, second = TransformersBackend(model, HEADS), TransformersBackend(model, other)
    before = first.attention_mass(prompts())
    second.attention_mass(prompts())
    for mass, again in zip(before, first.attention_mass(prompts()), strict=True):
        np.testing.assert_allclose(again, mass, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Gemma2Config", {"head_dim": 8}, "soft-caps its attention logits"),
        (
            "GptOssConfig",
            {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, **SLIDING},
            "attention sinks",
        ),
        ("BloomConfig", {"n_layer": 5, "n_head": 4}, "AttentionInterface"),
        (
            "Qwen3NextConfig",
            {"head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1},
            "linear_attention",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = saved(tmp_path, getattr(transformers, name)(**{**TINY, **changes}))
    with pytest.raises(UnsupportedModelError, match=message):
        TransformersBackend(model, HEADS)


def test_attention_of_another_kind_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose attention is not what the interface says: the load-time comparison."""
    from transformers.models.llama import modeling_llama

    eager = modeling_llama.eager_attention_forward

    def hotter(*arguments: Any, scaling: float, **kwargs: Any) -> Any:
        return eager(*arguments, scaling=2 * scaling, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", hotter)
    with pytest.raises(UnsupportedModelError, match="differs from the model's own"):
        TransformersBackend(tiny(tmp_path, "llama"), HEADS)


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny(tmp_path, "llama")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.q_proj"):
        TransformersBackend(model, HEADS)


def test_unknown_dtype(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"dtype must be 'auto' or one of .* got 'int8'"):
        TransformersBackend(tiny(tmp_path, "llama"), HEADS, dtype="int8")


def test_closed(tmp_path: Path) -> None:
    backend = TransformersBackend(tiny(tmp_path, "llama"), HEADS)
    backend.close()
    with pytest.raises(ClosedError):
        backend.attention_mass(prompts())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_equals_cpu(family: str, tmp_path: Path) -> None:
    model = tiny(tmp_path, family)
    cpu = TransformersBackend(model, HEADS, device="cpu").attention_mass(prompts())
    cuda = TransformersBackend(model, HEADS, device="cuda", dtype="float32")
    for mass, again in zip(cpu, cuda.attention_mass(prompts()), strict=True):
        np.testing.assert_allclose(again, mass, rtol=0, atol=2e-5)
