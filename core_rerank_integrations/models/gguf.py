"""Conversion of GGUF files to model folders."""

from __future__ import annotations

from pathlib import Path

from core_rerank_integrations.errors import ModelError, requires_extra


def convert_gguf(gguf: Path, target: Path) -> None:
    """Write the model in ``gguf`` as a folder: bfloat16 safetensors, configuration, tokenizer.

    Raises:
        ModelError: Transformers cannot read this file.
    """
    with requires_extra("transformers"):
        import accelerate  # noqa: F401  Transformers needs it to read GGUF, and checks late.
        import gguf as gguf_files
        import torch
        import transformers
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        adds_bos = gguf_files.GGUFReader(gguf).fields.get("tokenizer.ggml.add_bos_token")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            **source, **_dequantized(transformers), dtype=torch.bfloat16
        )
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise ModelError(f"Transformers cannot read {gguf}: {error}") from error
    if adds_bos is not None and adds_bos.contents():
        tokenizer.add_bos_token = True  # Transformers does not restore it, and Gemma needs it.
    # A model that was loaded from GGUF cannot be saved; a new one with its weights can.
    config = type(loaded.config).from_dict(
        {
            key: value
            for key, value in loaded.config.to_dict().items()
            if key not in {"quantization_config", "_name_or_path", "_model_name_or_path"}
        }
    )
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _dequantized(transformers: object) -> dict[str, object]:
    # From 5.18 on, Transformers keeps GGUF weights packed by default.
    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}
