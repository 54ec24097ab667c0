"""A prefix and its questions in one forward pass."""

from __future__ import annotations

from dataclasses import dataclass

from core_rerank_integrations.backends.local.prefix_cache import CachedPrefix
from core_rerank_integrations.method.prompt import SharedPrefix, TokenIds


@dataclass
class PrefixRun:
    """A prefix and the questions to run after it.

    Attributes:
        prefix: The prefix.
        questions: Token ids of the questions.
        cached: The cached prefix; ``None`` if the prefix has to run too.
    """

    prefix: SharedPrefix
    questions: list[TokenIds]
    cached: CachedPrefix | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens that have to run."""
        return sum(map(len, self.questions)) + (0 if self.cached else len(self.prefix.ids))
