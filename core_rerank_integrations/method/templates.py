"""Prompt templates: the turn markers around the user's message."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from core_rerank_integrations.errors import InvalidInputError


@dataclass(frozen=True)
class PromptTemplate:
    """The turn markers around the user's message.

    Attributes:
        name: Name of the template.
        turn_start: Text that opens the user's turn.
        turn_end: Text that closes the user's turn and opens the assistant's.
    """

    name: str
    turn_start: str
    turn_end: str

    @classmethod
    def from_chat(cls, render: Callable[[str], str], name: str = "chat") -> PromptTemplate:
        """Derive the turn markers from a chat template.

        Args:
            render: Renders one user message to text, with the assistant's turn opened.
            name: Name of the new template.

        Raises:
            InvalidInputError: The chat template drops, repeats or changes the user's message.
        """
        marker = "CORE-RERANK-USER-MESSAGE"
        turn_start, separator, turn_end = render(marker).partition(marker)
        if not separator or marker in turn_end:
            raise InvalidInputError(
                "the model's chat template does not show the user's message exactly once; "
                "pass template=PromptTemplate(name, turn_start, turn_end) instead"
            )
        return cls(name, turn_start, turn_end)


TEMPLATES = {
    template.name: template
    for template in (
        PromptTemplate(
            "granite",
            "<|start_of_role|>user<|end_of_role|>",
            "<|end_of_text|><|start_of_role|>assistant<|end_of_role|>",
        ),
        PromptTemplate(
            "llama-3",
            "<|start_header_id|>user<|end_header_id|>",
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>",
        ),
        PromptTemplate("mistral", "[INST]", "[/INST]"),
        PromptTemplate(
            "phi-4",
            "<|im_start|>user<|im_sep|>",
            "<|im_end|><|im_start|>assistant<|im_sep|>",
        ),
        PromptTemplate("chatml", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
        PromptTemplate("plain", "", "\n"),
    )
}
"""The package's templates by name."""
