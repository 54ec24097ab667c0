"""Entry point of ``vllm.general_plugins``: vLLM calls `register` in each of its processes."""

from __future__ import annotations

from core_rerank_integrations.backends.vllm.caller.process import end_with_owner
from core_rerank_integrations.backends.vllm.compat import (
    is_supported_version,
    key_query_blocks_by_request,
)

ARCHITECTURE_PREFIX = "CoRe"
MODELS = "core_rerank_integrations.backends.vllm.worker.model"


def register() -> None:
    """Register a probed counterpart of each of vLLM's decoders, which is imported on first use.

    Every vLLM on the machine calls this, also in programs that do not rerank. Versions that are
    not supported are left alone.
    """
    if not is_supported_version():
        return

    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for architecture in list(ModelRegistry.get_supported_archs()):
        if architecture.endswith("ForCausalLM") and not architecture.startswith(
            ARCHITECTURE_PREFIX
        ):
            counterpart = ARCHITECTURE_PREFIX + architecture
            ModelRegistry.register_model(counterpart, f"{MODELS}:{counterpart}")
            if architecture in MODELS_CONFIG_MAP:  # vLLM looks these settings up by name.
                MODELS_CONFIG_MAP.setdefault(counterpart, MODELS_CONFIG_MAP[architecture])
    key_query_blocks_by_request()
    end_with_owner()
