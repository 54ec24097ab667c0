"""What a reranker can be told, said once: for the class, the adapters and the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_serializer,
    model_validator,
)

from core_rerank_integrations.checks import check_count
from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.heads import HeadSet
from core_rerank_integrations.models import DEFAULT_MODEL
from core_rerank_integrations.prompt import PromptTemplate
from core_rerank_integrations.store import DocumentCache

BACKENDS = ("auto", "openvino", "transformers", "vllm", "vllm-shared")
VLLM_BACKENDS = ("vllm", "vllm-shared")


def check_backend(name: str) -> str:
    """``name``, if there is a backend of that name.

    Raises:
        InvalidInputError: There is none.
    """
    if name not in BACKENDS:
        raise InvalidInputError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def _counted(count: Any, info: ValidationInfo) -> Any:
    check_count(str(info.field_name), count)
    return count


Count = Annotated[int | None, BeforeValidator(_counted)]


class RerankerSettings(BaseModel):
    """Which model reads documents, by which heads, and how."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    model: str | Path = Field(
        default=DEFAULT_MODEL, description="Alias, hub id, model folder or GGUF file."
    )
    heads: HeadSet | str | Path | list[tuple[int, int]] | None = Field(
        default=None,
        description="Head set, its shipped name or file, or (layer, head) pairs; by default the "
        "set shipped for the model.",
    )
    backend: Annotated[str, AfterValidator(check_backend)] = Field(
        default="auto",
        description="Who runs the model: auto, openvino, transformers, vllm or vllm-shared.",
    )
    dtype: str = Field(default="auto", description="auto, float32, bfloat16, float16 or int8.")
    device: str | None = Field(
        default=None, description="Torch device; by default CUDA where it is there, else the CPU."
    )
    window: Count = Field(
        default=None, description="Most documents in a prompt; by default the head set's."
    )
    max_document_tokens: Count = Field(
        default=None, description="Longer documents are cut to this, with a warning."
    )
    document_cache: DocumentCache | None = Field(
        default=None,
        description="How much is kept of documents that were read, in memory and on disk.",
    )
    template: str | PromptTemplate | None = Field(
        default=None, description="Prompt template; by default the head set's."
    )
    engine_args: dict[str, Any] | None = Field(
        default=None, description="Further arguments for vLLM's engine."
    )

    @classmethod
    def checked(cls, **fields: Any) -> Self:
        """The settings.

        Raises:
            InvalidInputError: One of them has no meaning, or they contradict each other.
        """
        try:
            return cls(**fields)
        except ValidationError as error:
            problems = {
                str(cause)
                if isinstance(cause := item.get("ctx", {}).get("error"), InvalidInputError)
                else f"{item['loc'][0]}: {item['msg']}, got {fields[str(item['loc'][0])]!r}"
                for item in error.errors()
            }
            raise InvalidInputError("; ".join(sorted(problems))) from error

    @model_validator(mode="after")
    def _check_vllm(self) -> Self:
        if self.document_cache is not None and self.backend in VLLM_BACKENDS:
            raise InvalidInputError(
                f"document_cache is not for {self.backend!r}, which keeps documents in vLLM's own "
                "cache: set engine_args gpu_memory_utilization or kv_cache_memory_bytes"
            )
        if self.engine_args and self.backend not in VLLM_BACKENDS:
            raise InvalidInputError(f"engine_args are for the vLLM backends, not {self.backend!r}")
        return self

    @field_serializer("model", "heads", mode="wrap")
    def _without_paths(self, value: Any, serialize: SerializerFunctionWrapHandler) -> Any:
        """LlamaIndex writes fields as JSON, which knows no paths."""
        return str(value) if isinstance(value, Path) else serialize(value)
