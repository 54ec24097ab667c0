"""Settings of a reranker and options of a call, shared by the class, the adapters and the CLI."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypedDict
from urllib.parse import urlsplit

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from core_rerank_integrations._internal.files import expand_user
from core_rerank_integrations.errors import HeadSetError, InvalidInputError
from core_rerank_integrations.heads.head_set import HeadSet
from core_rerank_integrations.heads.scoring_config import (
    Count,
    Finite,
    FirstStage,
    NotNegative,
    Positive,
    Probability,
    Whole,
)
from core_rerank_integrations.method.templates import PromptTemplate
from core_rerank_integrations.models.aliases import DEFAULT_MODEL

Backend = Literal["auto", "openvino", "transformers", "vllm", "vllm-shared"]
VLLM_BACKENDS = ("vllm", "vllm-shared")

_PASSWORD = re.compile(r"^(\w+://)?.*@")


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool | np.bool_):
        raise ValueError("must be a number")
    return value


def _server_url(url: str) -> str:
    """Check the address of a server, and remove what routes begin with.

    Raises:
        InvalidInputError: It is not an address, or holds a password.
    """
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address or any(not "!" <= character <= "~" for character in url):
        shown = _PASSWORD.sub(r"\1...@", url)
        raise InvalidInputError(
            "base_url must be the address of a server, such as 'http://127.0.0.1:8080', got "
            f"{shown!r}"
        )
    if parts.username is not None or parts.query or parts.fragment:
        raise InvalidInputError(
            "base_url must not contain a user name, a password, '?' or '#': give the server's key "
            "as api_key, or by the environment variable CORE_RERANK_API_KEY"
        )
    return url.rstrip("/").removesuffix("/v1")


Threshold = Annotated[Probability, BeforeValidator(_not_bool)] | Literal["auto"]


class CheckedModel(BaseModel):
    """A pydantic model whose errors are this package's own."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    @classmethod
    def checked(cls, **fields: Any) -> Self:
        """Validate the fields.

        Raises:
            InvalidInputError: A field is invalid; the message names it, with its value.
            HeadSetError: ``heads`` is not a list of (layer, head) pairs.
        """
        try:
            return cls(**fields)
        except ValidationError as error:
            problems: dict[str, list[str]] = {}
            for item in error.errors():
                cause = item.get("ctx", {}).get("error")
                if isinstance(cause, HeadSetError | InvalidInputError):
                    raise cause from None
                name = str(item["loc"][0]) if item["loc"] else ""
                problems.setdefault(name, []).append(item["msg"].removeprefix("Value error, "))
            # Without its cause, which shows all fields, and a password among them.
            raise InvalidInputError(
                "; ".join(
                    f"{name}: {' or '.join(messages)}, got {fields[name]!r}"
                    if name
                    else messages[0]
                    for name, messages in problems.items()
                )
            ) from None


class DocumentCache(CheckedModel):
    """Size and folder of the cache of documents that were read.

    A cached document costs a rerank only the tokens of the question. Every document that is
    ranked stays in memory; `CoReReranker.cache_documents` also writes documents to disk, for
    later processes. The least recently used documents are dropped first.
    """

    model_config = ConfigDict(frozen=True)

    memory_bytes: Whole = Field(
        default=1 << 30, ge=0, description="Maximum size in memory, on the device; 0 caches none."
    )
    disk_bytes: Whole = Field(
        default=32 << 30,
        ge=0,
        description="Maximum size on disk, over all models; 0 does not use the disk.",
    )
    folder: Path | None = Field(
        default=None,
        description="Folder of the files; by default 'documents' in the package's cache.",
    )

    @field_validator("folder")
    @classmethod
    def _expand_user(cls, folder: Path | None) -> Path | None:
        return None if folder is None else expand_user(folder)

    @field_serializer("folder")
    def _folder_as_text(self, folder: Path | None) -> str | None:
        return None if folder is None else str(folder)


class RerankerSettings(CheckedModel):
    """The model, its heads, and how documents are read."""

    model: str | Path = Field(
        default=DEFAULT_MODEL, description="Alias, hub id, model folder or GGUF file."
    )
    heads: HeadSet | str | Path | list[tuple[int, int]] | None = Field(
        default=None,
        description="Head set, its shipped name or file, or (layer, head) pairs; by default the "
        "set shipped for the model.",
    )
    backend: Backend = Field(
        default="auto",
        description="Library that runs the model: auto, openvino, transformers, vllm or "
        "vllm-shared.",
    )
    dtype: str = Field(default="auto", description="auto, float32, bfloat16, float16 or int8.")
    device: str | None = Field(
        default=None, description="Torch device; by default CUDA if available, else the CPU."
    )
    documents_per_prompt: Count | None = Field(
        default=None, description="Maximum documents in a prompt; by default the head set's."
    )
    max_document_tokens: Count | None = Field(
        default=None, description="Longer documents are truncated to this, with a warning."
    )
    max_query_tokens: Count = Field(
        default=1024,
        description="Longer queries are refused, because each token is read for every document.",
    )
    document_cache: DocumentCache | None = Field(
        default=None, description="Size and folder of the cache of documents that were read."
    )
    template: str | PromptTemplate | None = Field(
        default=None, description="Prompt template; by default the head set's."
    )
    engine_args: dict[str, Any] | None = Field(
        default=None, description="More arguments for vLLM's engine."
    )
    revision: str | None = Field(
        default=None, description="Branch, tag or commit of a hub id; by default main."
    )
    token: str | None = Field(
        default=None,
        repr=False,
        exclude=True,  # Saved settings contain no secret.
        description="Access token of the hub; by default HF_TOKEN, or the one stored on this "
        "machine.",
    )
    local_files_only: bool = Field(
        default=False,
        description="Whether nothing is downloaded, so that a missing model is an error.",
    )

    @field_validator("heads", mode="before")
    @classmethod
    def _check_pairs(cls, heads: Any) -> Any:
        if isinstance(heads, Sequence) and not isinstance(heads, str):
            HeadSet.from_pairs(heads)  # Its errors are clearer than pydantic's for a union.
        return heads

    @model_validator(mode="after")
    def _check_vllm(self) -> Self:
        if self.document_cache is not None and self.backend in VLLM_BACKENDS:
            raise InvalidInputError(
                f"document_cache is not for {self.backend!r}, which caches documents in vLLM's own "
                "cache: set engine_args gpu_memory_utilization or kv_cache_memory_bytes"
            )
        if self.device is not None and self.backend in VLLM_BACKENDS:
            raise InvalidInputError(
                f"device={self.device!r} is not for {self.backend!r}, which runs on the platform "
                "that vLLM was built for: leave it out, and choose GPUs by CUDA_VISIBLE_DEVICES"
            )
        if self.engine_args and self.backend not in VLLM_BACKENDS:
            raise InvalidInputError(f"engine_args are for the vLLM backends, not {self.backend!r}")
        return self

    @field_serializer("model", "heads", mode="wrap")
    def _paths_as_text(self, value: Any, serialize: SerializerFunctionWrapHandler) -> Any:
        """Serialize paths as strings, because JSON has no path type."""
        return str(value) if isinstance(value, Path) else serialize(value)


class ServerSettings(CheckedModel):
    """A server that ranks, instead of a model in this process."""

    base_url: Annotated[str, AfterValidator(_server_url)] | None = Field(
        default=None,
        description="Address of a server, `core-rerank serve`, that ranks instead of a model in "
        "this process.",
    )
    api_key: SecretStr | None = Field(
        default=None,
        repr=False,
        exclude=True,  # Saved settings contain no secret.
        description="The server's key; by default that of CORE_RERANK_API_KEY.",
    )
    timeout: Annotated[Positive, BeforeValidator(_not_bool)] = Field(
        default=60.0, description="Seconds after which a request to the server is an error."
    )
    max_retries: Annotated[Whole, Field(ge=0)] = Field(
        default=3,
        description="How often a request is repeated if the server is busy or cannot be reached.",
    )


class ReplicaResources(CheckedModel):
    """What each model gets on Ray."""

    num_cpus: Count = Field(default=1, description="Processors of each replica, and its threads.")
    num_gpus: NotNegative = Field(
        default=0.0, description="GPUs of each replica; a fraction shares one."
    )

    def actor_options(self) -> dict[str, Any]:
        """Return options of an actor.

        The number of threads is that of the processors, also where Ray inherits another one.
        """
        return {
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(self.num_cpus)}},
        }


class RerankOptions(CheckedModel):
    """Options of one call that ranks documents."""

    model_config = ConfigDict(frozen=True)

    top_n: Count | None = Field(
        default=None, description="Maximum number of results; by default all."
    )
    score_threshold: Threshold | None = Field(
        default=None,
        description="Minimum probability of a result; needs calibrated heads. 'auto' returns "
        "nothing if the list's answerability is below the head set's threshold.",
    )
    min_score: Annotated[Finite, BeforeValidator(_not_bool)] | None = Field(
        default=None, description="Minimum score of a result."
    )
    first_stage: FirstStage | None = Field(
        default=None,
        description="What ordered the documents, best first: bm25, dense (embeddings) or other. "
        "The order then counts as much as the head set says; by default it does not.",
    )
    max_seconds: Annotated[Positive, BeforeValidator(_not_bool)] | None = Field(
        default=None,
        description="Time limit for reading documents. Documents that are not read in time come "
        "last, with reranked=False.",
    )
    evidence: bool = Field(
        default=False, description="Whether to score the sentences of each document."
    )


class RerankKeywords(TypedDict, total=False):
    """The fields of `RerankOptions` as keyword arguments."""

    top_n: int | None
    score_threshold: float | Literal["auto"] | None
    min_score: float | None
    first_stage: FirstStage | None
    max_seconds: float | None
    evidence: bool
