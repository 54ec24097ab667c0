"""The interface between what to score and the library that runs the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from core_rerank_integrations.method.prompt import SharedPrefix, TokenIds
from core_rerank_integrations.method.scoring import Mass


class PromptGroup(NamedTuple):
    """The questions that are asked about the same documents.

    Attributes:
        prefix: The part of the prompt that all questions share. It also holds the baseline
            question, ``N/A``.
        questions: Token ids of the questions, each of shape [tokens].
    """

    prefix: SharedPrefix
    questions: Sequence[TokenIds]


class GroupMass(NamedTuple):
    """The attention mass of a `PromptGroup`.

    Each array is float32 and has shape [weight sets or heads, context length + 1]: all tokens
    before the query span and its first token, because document spans may reach that far.

    Attributes:
        baseline: Attention mass of the baseline question.
        questions: Attention mass of each question.
    """

    baseline: Mass
    questions: list[Mass]


class BackendStats(NamedTuple):
    """Counters of a backend.

    Attributes:
        tokens_run: Number of prompt tokens the model has computed.
        prefixes_cached: Number of prefixes in memory.
        bytes_cached: Size of the cached prefixes in memory.
        prefixes_asked: Number of prefixes that questions were asked about, one for each question;
            0 with vLLM, which does not say which ones it knew.
        prefixes_known: How many of these were cached.
    """

    tokens_run: int
    prefixes_cached: int
    bytes_cached: int
    prefixes_asked: int = 0
    prefixes_known: int = 0


class AttentionBackend(Protocol):
    """Run a model up to its highest selected head, and report what these heads attend to."""

    max_context: int
    """Maximum number of tokens of a prompt."""

    @property
    def is_alive(self) -> bool:
        """Whether calls are answered; ``False`` after vLLM's engine has died."""
        ...

    @property
    def dtype(self) -> object:
        """Precision that the model runs in, which ``auto`` may have selected."""
        ...

    @property
    def identity(self) -> str:
        """Text that differs wherever precision or rounding may change the attention."""
        ...

    @property
    def stats(self) -> BackendStats:
        """Counters since the backend was loaded."""
        ...

    def attention_mass(
        self, groups: Sequence[PromptGroup], weights: Mass | None = None
    ) -> list[GroupMass]:
        """Compute the attention mass of the query span on every token before it.

        For each selected head, the softmax attention of the query span's tokens over the whole
        prompt, averaged over these tokens (arXiv 2510.02219, section 3). The mass of a prefix
        and of its baseline is computed once and may be cached. Thread-safe.

        Args:
            groups: Distinct prefixes and their questions.
            weights: Weights of the heads, shape [weight sets, heads], heads in the order of the
                head set. ``None`` returns the mass of each head.

        Returns:
            One result per group.
        """
        ...

    def cache_prefixes(self, prefixes: Sequence[SharedPrefix]) -> int:
        """Compute what prefixes and their baselines need, and cache it for later questions.

        Returns:
            Number of bytes written to disk; 0 for prefixes that are on disk already.
        """
        ...

    def clear_cache(self) -> None:
        """Drop all prefixes from memory."""
        ...

    def close(self) -> None:
        """Free the model. No other call may follow."""
        ...
