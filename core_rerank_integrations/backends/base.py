"""The line between what to score and what runs the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from core_rerank_integrations.prompt import Prompt
from core_rerank_integrations.scoring import Mass


class AttentionBackend(Protocol):
    """Runs a model as far as the highest selected head, and reports what its heads attend to."""

    max_context: int
    """Most tokens of one prompt."""

    def attention_mass(self, prompts: Sequence[Prompt]) -> list[Mass]:
        """Attention mass on every prompt's prefix, and on the first token of its query span.

        For each selected head, the softmax attention of the query span's tokens over the whole
        prompt; mean over those tokens, sum over heads with their weights (arXiv 2510.02219,
        section 3). Prompts that share a prefix share its computation. Safe to call from
        several threads.

        Returns:
            One float32 array per prompt, shape [len(prompt.prefix) + 1], as far as document
            spans may reach.
        """
        ...

    def head_mass(self, prompts: Sequence[Prompt]) -> list[Mass]:
        """The same before the sum: attention mass of every head by itself, unweighted.

        Returns:
            One float32 array per prompt, shape [heads, len(prompt.prefix) + 1], heads in the
            order of the head set.
        """
        ...

    def remember(self, prompts: Sequence[Prompt]) -> int:
        """Read what stands before the query of every prompt, and keep it for later ones.

        Returns:
            Bytes written to disk: 0 for what lies there already, or is kept elsewhere.
        """
        ...

    def forget(self) -> None:
        """Drop what memory keeps of prompts that were read, so that the next ones are read anew."""
        ...

    def close(self) -> None:
        """Free the model. No call may follow."""
        ...
