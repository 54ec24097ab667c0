"""Conversion of GGUF files to model folders, by NumPy."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from core_rerank_integrations.errors import ModelError, UnsupportedModelError, requires_extra
from core_rerank_integrations.models.local_model import without_advice
from core_rerank_integrations.models.safetensors_files import (
    NewTensor,
    from_float32,
    write_safetensors,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONVERSION = 1
"""Increased when the result of a conversion changes."""
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
"""Model type and class in Transformers of each architecture that can be converted."""

FIELDS = {
    "max_position_embeddings": "context_length",
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
CHUNK = 1 << 22
"""Maximum number of weights that are converted at a time. Intermediate results are larger."""
SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
TOKENIZER_FIELDS = {
    "tokenizer_type": "model",
    "pre_tokenizer_type": "pre",
    "tokens": "tokens",
    "scores": "scores",
    "token_type": "token_type",
    "merges": "merges",
    "add_prefix_space": "add_space_prefix",
}
WEIGHTS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_WEIGHTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_LAYER_WEIGHTS = {
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
    "gemma3": {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
ROPE_FACTORS = "rope_freqs.weight"
"""The tensor by which Llama 3's rotary frequencies are divided."""


def convert_gguf(gguf: Path, target: Path) -> None:
    """Write the model in ``gguf`` as a folder: bfloat16 safetensors, configuration, tokenizer.

    Raises:
        UnsupportedModelError: The architecture cannot be converted.
        ModelError: The file is damaged, or holds a tensor or a setting that is not known.
    """
    with requires_extra("cpu"), without_advice():
        import gguf as gguf_files
        import transformers  # noqa: F401
    try:
        reader = gguf_files.GGUFReader(gguf)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        architecture = fields["general.architecture"]
        if architecture not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"GGUF files of architecture {architecture!r} ({gguf}) cannot be converted, only "
                f"{', '.join(ARCHITECTURES)}; use the model's safetensors files"
            )
        is_llama = architecture == "llama"
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        factors = tensors.pop(ROPE_FACTORS, None)
        config = _config(architecture, fields, tensors, None if factors is None else factors.data)
        target.mkdir()
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _tokenizer(architecture, fields).save_pretrained(target)

        def numbers(tensor: Any) -> npt.NDArray[np.uint16]:
            shape = _shape(tensor)
            rounded = np.empty(shape, np.uint16)
            rows = max(CHUNK // shape[-1], 1)
            for start in range(0, shape[0], rows):
                part = slice(start, start + rows)
                full = gguf_files.dequantize(tensor.data[part], tensor.tensor_type)
                if architecture == "gemma3" and tensor.name.endswith("norm.weight"):
                    full = full - np.float32(1)  # llama.cpp adds the offset of Gemma's norms.
                rounded[part] = from_float32(full, "BF16")
            return _deinterleaved(rounded, tensor.name, config) if is_llama else rounded

        write_safetensors(
            target / "model.safetensors",
            [
                NewTensor(
                    _weight_name(architecture, name),
                    "BF16",
                    _shape(tensor),
                    partial(numbers, tensor),
                )
                for name, tensor in tensors.items()
            ],
        )
    except (ValueError, TypeError, LookupError, NotImplementedError) as error:
        raise ModelError(f"cannot read {gguf}, the file may be damaged: {error}") from error


def _config(
    architecture: str, fields: dict[str, Any], tensors: dict[str, Any], factors: Any
) -> dict[str, Any]:
    """Return what the file says, without the defaults of a version of Transformers."""
    model_type, class_name = ARCHITECTURES[architecture]
    settings = {
        name: fields[f"{architecture}.{key}"]
        for name, key in FIELDS.items()
        if f"{architecture}.{key}" in fields
    }
    if architecture == "llama" and "llama.rope.dimension_count" in fields:
        settings.setdefault("head_dim", fields["llama.rope.dimension_count"])
    settings.setdefault("num_key_value_heads", settings["num_attention_heads"])
    if (window := fields.get(f"{architecture}.attention.sliding_window")) is not None:
        settings["sliding_window"] = window
    if architecture == "gemma3":
        # llama.cpp knows the 27B model, which scales differently, by its 62 layers.
        heads, layers = settings["num_attention_heads"], settings["num_hidden_layers"]
        is_27b = layers == 62
        scalar = settings["hidden_size"] // heads if is_27b else settings["head_dim"]
        settings["query_pre_attn_scalar"] = scalar
    if scaling := _rope_scaling(architecture, fields, factors):
        theta = settings.pop("rope_theta", 10000.0)
        parameters = {"rope_theta": theta, **scaling}
        settings["rope_parameters"] = parameters
        if architecture == "gemma3":
            local = {"rope_theta": 10000.0, "rope_type": "default"}
            settings["rope_parameters"] = {"full_attention": parameters, "sliding_attention": local}
    for name, key in SPECIAL_TOKENS.items():
        if (token := fields.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            settings[f"{name}_token_id"] = token
    return {
        "model_type": model_type,
        "architectures": [class_name],
        "dtype": "bfloat16",
        "vocab_size": _shape(tensors["token_embd.weight"])[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        **settings,
    }


def _rope_scaling(architecture: str, fields: dict[str, Any], factors: Any) -> dict[str, Any]:
    kind = fields.get(f"{architecture}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ValueError(f"the rotary embedding is scaled by {kind!r}, which is not converted")
    if kind == "linear":
        return {"rope_type": "linear", "factor": fields[f"{architecture}.rope.scaling.factor"]}
    if factors is None:
        return {}
    # All models with this tensor were trained with Llama 3.1's scaling; the factor differs.
    return {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _tokenizer(architecture: str, fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import convert_gguf_tokenizer

    described = {
        name: fields[f"tokenizer.ggml.{key}"]
        for name, key in TOKENIZER_FIELDS.items()
        if f"tokenizer.ggml.{key}" in fields
    }
    ids = {
        name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL_TOKENS.items()
    }
    described |= {f"{name}_token_id": token for name, token in ids.items() if token is not None}
    try:
        converted, settings = convert_gguf_tokenizer(architecture, described)
    except Exception as error:  # The tokenizers library raises no other type.
        raise ValueError(f"its tokenizer cannot be converted: {error}") from error
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=converted,
        chat_template=fields.get("tokenizer.chat_template"),
        **{
            f"{name}_token": None if token is None else described["tokens"][token]
            for name, token in ids.items()
        },
        **settings,
    )
    if fields.get("tokenizer.ggml.add_bos_token"):
        tokenizer.add_bos_token = True
    return tokenizer


def _weight_name(architecture: str, name: str) -> str:
    module, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)", module):
        layer = LAYER_WEIGHTS | OTHER_LAYER_WEIGHTS.get(architecture, {})
        found = layer.get(match[2])
        found = found and f"model.layers.{match[1]}.{found}"
    else:
        found = WEIGHTS.get(module)
    if not found or kind not in ("weight", "bias"):
        raise ValueError(f"the tensor {name} is not known in a model of type {architecture!r}")
    return f"{found}.{kind}"


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


def _deinterleaved(
    weights: npt.NDArray[np.uint16], name: str, config: dict[str, Any]
) -> npt.NDArray[np.uint16]:
    """Undo that llama.cpp interleaves the halves of the queries and keys of a head."""
    match = re.search(r"\.attn_([qk])\.", name)
    if not match:
        return weights
    heads = config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
    pairs = weights.reshape(heads, -1, 2, *weights.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weights.shape)
