"""Conversion of GGUF files: what llama.cpp's converter did to a model is undone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import VOCABULARY, tiny

from core_rerank_integrations.errors import ModelError, UnsupportedModelError
from core_rerank_integrations.models.gguf import convert_gguf
from core_rerank_integrations.models.local_model import LocalModel

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "llama-3-rope": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "gemma3": gguf.MODEL_ARCH.GEMMA3,
}
SENTENCEPIECE = ("phi3", "gemma3")


def as_llama_cpp(family: str, name: str, weights: np.ndarray, config: Any) -> np.ndarray:
    """Do to the weights what llama.cpp's ``convert_hf_to_gguf.py`` does."""
    if family == "gemma3" and name.endswith("norm.weight"):
        return weights + 1
    for kind, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
        if family.startswith("llama") and f"{kind}_proj" in name:
            halves = weights.reshape(heads, 2, -1, *weights.shape[1:])
            return halves.swapaxes(1, 2).reshape(weights.shape)
    return weights


def write_gguf(path: Path, family: str, model: LocalModel, **fields: str) -> None:
    """Write a model as GGUF; names of tensors are from the gguf package."""
    config, architecture = model.config(), ARCHITECTURES[family]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if head_dim := getattr(config, "head_dim", None):
        writer.add_key_length(head_dim)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    for name, value in fields.items():
        writer.add_string(name.replace("__", "."), value)
    tokens = ["a", "b", "ab", *(f"<{index}>" for index in range(3, VOCABULARY))]
    writer.add_tokenizer_model("llama" if family in SENTENCEPIECE else "gpt2")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(index) for index in range(VOCABULARY)])
    writer.add_token_types([gguf.TokenType.NORMAL] * VOCABULARY)
    if family not in SENTENCEPIECE:
        writer.add_token_merges(["a b"])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in load_file(model.path / "model.safetensors").items():
        module, _, kind = name.rpartition(".")
        weights = as_llama_cpp(family, name, tensor.float().numpy(), config)
        writer.add_tensor(f"{names.get_name(module)}.{kind}", np.ascontiguousarray(weights))
    if rope.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", np.array([1, 1, 4, rope["factor"]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_weights_and_configuration_survive_llama_cpp(family: str, tmp_path: Path) -> None:
    model = tiny(tmp_path / "model", family)
    write_gguf(tmp_path / "tiny.gguf", family, model)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "converted")
    converted = LocalModel(tmp_path / "converted", None)
    expected = load_file(model.path / "model.safetensors")
    found = load_file(converted.path / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if family == "gemma3" and name.endswith("norm.weight"):
            tensor = (tensor + 1) - 1  # llama.cpp rounds the sum to float32.
        assert torch.equal(found[name], tensor.to(torch.bfloat16)), name
    before, after = model.config().to_dict(), converted.config().to_dict()
    not_in_gguf = {"dtype", "initializer_range", "architectures", "_name_or_path"}
    not_in_gguf.add("transformers_version")  # A model that was moved has the same configuration.
    if family == "llama-3-rope":
        rope = after["rope_parameters"]
        assert (rope["rope_type"], rope["factor"]) == ("llama3", 8.0)
        not_in_gguf.add("rope_parameters")  # The original length is always Llama 3's.
    if family == "gemma3":
        not_in_gguf.add("query_pre_attn_scalar")
        assert after["query_pre_attn_scalar"] == after["head_dim"]
    assert after.pop("rms_norm_eps") == pytest.approx(before.pop("rms_norm_eps"))  # float32
    differing = {name for name in before if before[name] != after.get(name)}
    assert differing <= not_in_gguf


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"llama__rope__scaling__type": "yarn"}, "scaled by 'yarn'"),
        ({"general__architecture": "mamba"}, "'mamba' .* cannot be converted"),
    ],
)
def test_what_would_change_scores_silently_is_refused(
    fields: dict[str, str], message: str, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "tiny.gguf", "llama", tiny(tmp_path / "model", "llama"), **fields)
    with pytest.raises(ModelError, match=message):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "converted")


def test_a_tensor_without_a_name_is_refused(tmp_path: Path) -> None:
    model = tiny(tmp_path / "model", "qwen3")
    model.config()
    write_gguf(tmp_path / "tiny.gguf", "qwen3", model)
    content = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(content.replace(b"attn_q_norm", b"attn_q_mark"))
    with pytest.raises(ModelError, match=r"attn_q_mark\.weight is not known"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "converted")
    assert issubclass(UnsupportedModelError, ModelError)
