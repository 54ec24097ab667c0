"""The choice of a backend, and its loading."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from core_rerank_integrations.backends.base import AttentionBackend
from core_rerank_integrations.backends.openvino.decoder import openvino_runs
from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.heads.head_set import HeadSet
from core_rerank_integrations.heads.shipped import sets_of
from core_rerank_integrations.models.adapter import with_adapter
from core_rerank_integrations.models.local_model import LocalModel
from core_rerank_integrations.settings import RerankerSettings


def chosen_backend(settings: RerankerSettings, model: LocalModel, heads: HeadSet) -> str:
    """Return the backend that ``settings.backend`` selects on this machine.

    ``auto`` selects OpenVINO on a CPU, if it is installed and supports the model, else
    Transformers. vLLM is never selected by itself, because it takes the memory of a GPU and
    starts processes.
    """
    if settings.backend != "auto":
        return settings.backend
    device = settings.device
    uses_openvino = (
        device in (None, "cpu")
        and settings.dtype != "float16"
        and find_spec("openvino") is not None
        and any(model.path.glob("*.safetensors"))
        and not (device is None and _has_cuda())
        and openvino_runs(model.config(), heads.highest_layer + 1)
    )
    return "openvino" if uses_openvino else "transformers"


def allows_adapter(backend: str) -> bool:
    """Return whether a backend may change the model's weights, as the adapter of heads does.

    An engine that also generates needs them unchanged.
    """
    return backend != "vllm-shared"


def check_adapter(backend: str, model: LocalModel, heads: HeadSet) -> None:
    """Check that the backend runs the model with the adapter of the heads.

    Raises:
        InvalidInputError: The heads have an adapter, and the engine also generates.
    """
    if heads.adapter is not None and not allows_adapter(backend):
        plain = [other.name for other in sets_of(model.model_id) if other.adapter is None]
        raise InvalidInputError(
            f"the heads {heads.name!r} have an adapter, which changes the model's weights, and an "
            "engine that also generates needs them unchanged: use an engine that only reranks, "
            "backend='vllm', or heads without an adapter"
            + (f" (shipped for this model: {', '.join(plain)})" if plain else "")
        )


def load_backend(
    backend: str, settings: RerankerSettings, model: LocalModel, heads: HeadSet, engine: Any = None
) -> AttentionBackend:
    """Load a model, with the adapter of ``heads`` if they have one, up to the highest of them.

    Args:
        backend: The backend; see `chosen_backend`.
        settings: Precision, device, cache and engine arguments.
        model: The model.
        heads: The heads to read.
        engine: For ``vllm-shared``, a running engine of the caller.

    Raises:
        InvalidInputError: The device does not belong to the backend, or the heads have an adapter
            and the engine also generates.
        HeadSetError: The adapter of the heads was trained on another model.
        UnsupportedModelError: The backend cannot read the attention of the model.
    """
    dtype = settings.dtype
    check_adapter(backend, model, heads)
    model = with_adapter(
        model, heads, token=settings.token, local_files_only=settings.local_files_only
    )
    if backend == "openvino":
        if settings.device not in (None, "cpu"):
            raise InvalidInputError(
                f"the OpenVINO backend runs on the CPU, not on {settings.device!r}"
            )
        from core_rerank_integrations.backends.openvino.backend import OpenVINOBackend
        from core_rerank_integrations.backends.openvino.self_test import check_attention

        check_attention(model, heads.highest_layer + 1)
        return OpenVINOBackend(model, heads, dtype=dtype, document_cache=settings.document_cache)
    if backend == "vllm-shared":
        from core_rerank_integrations.backends.vllm.caller.shared import SharedVLLMBackend

        return SharedVLLMBackend(
            model, heads, engine=engine, dtype=dtype, engine_args=settings.engine_args
        )
    if backend == "vllm":
        from core_rerank_integrations.backends.vllm.caller.dedicated import VLLMBackend

        return VLLMBackend(model, heads, dtype=dtype, engine_args=settings.engine_args)
    from core_rerank_integrations.backends.transformers.backend import TransformersBackend

    return TransformersBackend(
        model,
        heads,
        dtype=dtype,
        device=settings.device,
        document_cache=settings.document_cache,
    )


def _has_cuda() -> bool:
    if find_spec("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())
