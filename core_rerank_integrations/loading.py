"""What a model on disk becomes: a backend that runs it, and the writer of its prompts."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from core_rerank_integrations.backends.base import AttentionBackend
from core_rerank_integrations.backends.openvino.decoder import openvino_runs
from core_rerank_integrations.errors import HeadSetError, InvalidInputError
from core_rerank_integrations.heads import HeadSet, default_head_set
from core_rerank_integrations.models import LocalModel
from core_rerank_integrations.prompt import TEMPLATES, PromptEncoder, PromptTemplate
from core_rerank_integrations.reading import Reader
from core_rerank_integrations.settings import check_backend
from core_rerank_integrations.store import DocumentCache


def chosen_backend(
    name: str, model: LocalModel, heads: HeadSet, dtype: str = "auto", device: str | None = None
) -> str:
    """The backend that ``name`` stands for, here.

    ``auto`` is OpenVINO where that is installed, runs the model, and is not slower than what else
    there is: on a CPU. Else it is Transformers. vLLM, which takes a GPU's memory and starts
    processes, is asked for by name.

    Raises:
        InvalidInputError: There is none of that name.
    """
    check_backend(name)
    if name != "auto":
        return name
    runs_here = (
        device in (None, "cpu")
        and dtype != "float16"
        and find_spec("openvino") is not None
        and any(model.path.glob("*.safetensors"))
        and not (device is None and _has_cuda())
        and openvino_runs(model.config(), heads.highest_layer + 1)
    )
    return "openvino" if runs_here else "transformers"


def _has_cuda() -> bool:
    if find_spec("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())


def load_reader(
    backend: str,
    model: LocalModel,
    heads: HeadSet,
    dtype: str,
    device: str | None = None,
    template: str | PromptTemplate | None = None,
    engine_args: Mapping[str, Any] | None = None,
    engine: Any = None,
    document_cache: DocumentCache | None = None,
) -> Reader:
    """Whatever reads lists with ``model``; see `load_backend` and `load_encoder`."""
    encoder = load_encoder(model, template or heads.template)
    loaded = load_backend(backend, model, heads, dtype, device, engine_args, engine, document_cache)
    return Reader(encoder, loaded)


def load_backend(
    name: str,
    model: LocalModel,
    heads: HeadSet,
    dtype: str,
    device: str | None = None,
    engine_args: Mapping[str, Any] | None = None,
    engine: Any = None,
    document_cache: DocumentCache | None = None,
) -> AttentionBackend:
    """Load a model as far as ``heads`` need it; see `chosen_backend`."""
    name = chosen_backend(name, model, heads, dtype, device)
    if name == "openvino":
        if device not in (None, "cpu"):
            raise InvalidInputError(f"the OpenVINO backend runs on the CPU, not on {device!r}")
        from core_rerank_integrations.backends.openvino.backend import OpenVINOBackend

        return OpenVINOBackend(model, heads, dtype=dtype, document_cache=document_cache)
    if name == "vllm-shared":
        from core_rerank_integrations.backends.vllm.shared import SharedVLLMBackend

        return SharedVLLMBackend(model, heads, engine=engine, dtype=dtype, engine_args=engine_args)
    if name == "vllm":
        from core_rerank_integrations.backends.vllm.dedicated import VLLMBackend

        return VLLMBackend(model, heads, dtype=dtype, engine_args=engine_args)
    from core_rerank_integrations.backends.transformers import TransformersBackend

    return TransformersBackend(
        model, heads, dtype=dtype, device=device, document_cache=document_cache
    )


def load_encoder(model: LocalModel, template: str | PromptTemplate | None = None) -> PromptEncoder:
    """The writer of a model's prompts.

    Args:
        model: Whose tokenizer.
        template: A template or its name; ``None`` takes that of the head set shipped for the
            model, else the model's chat template.

    Raises:
        InvalidInputError: There is no template of that name.
    """
    tokenizer = model.tokenizer()
    chosen = template or _shipped_template(model)
    if isinstance(chosen, str):
        if chosen not in TEMPLATES:
            raise InvalidInputError(
                f"there is no prompt template {chosen!r}; known are {', '.join(TEMPLATES)}"
            )
        chosen = TEMPLATES[chosen]
    return PromptEncoder(tokenizer.backend_tokenizer, chosen or _chat_template(tokenizer))


def _shipped_template(model: LocalModel) -> str | None:
    try:
        return default_head_set(model.model_id).template
    except HeadSetError:
        return None


def _chat_template(tokenizer: Any) -> PromptTemplate:
    if not tokenizer.chat_template:
        return TEMPLATES["plain"]

    def render(message: str) -> str:
        text: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
        )
        # The tokenizer puts its begin-of-sequence token in front by itself.
        begins = tokenizer.bos_token and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        return text.removeprefix(tokenizer.bos_token) if begins else text

    return PromptTemplate.from_chat(render)
