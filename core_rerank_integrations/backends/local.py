"""What backends that run the model in this process share: batches, and documents that are known."""

from __future__ import annotations

import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import cast

from core_rerank_integrations.backends.known_documents import KnownDocuments
from core_rerank_integrations.backends.prompt_groups import PromptGroup
from core_rerank_integrations.errors import ClosedError, InvalidInputError
from core_rerank_integrations.heads import HeadSet
from core_rerank_integrations.prompt import Prompt
from core_rerank_integrations.scoring import Mass

MOST_HELD_BYTES = 1 << 28
"""Of documents that come from disk, in one pass, where memory is to hold less between passes."""


class LocalBackend(ABC):
    """Reads what prompts share once, keeps it, and runs one pass at a time.

    Args:
        head_set: The heads to read.
        known: What is kept of documents.
        keeps: Whether anything can be kept: not where a token's position depends on what follows.
    """

    max_context: int

    def __init__(self, head_set: HeadSet, known: KnownDocuments, keeps: bool = True) -> None:
        self._weights = head_set.weights
        self._known = known
        self._keeps = keeps
        self._lock = threading.Lock()
        self._closed = False

    def attention_mass(self, prompts: Sequence[Prompt]) -> list[Mass]:
        """See `AttentionBackend.attention_mass`."""
        return [self._weights @ mass for mass in self.head_mass(prompts)]

    def head_mass(self, prompts: Sequence[Prompt]) -> list[Mass]:
        """See `AttentionBackend.head_mass`."""
        masses: list[Mass | None] = [None] * len(prompts)
        groups = self._in_order(PromptGroup.collect(prompts))
        while groups:
            with self._lock:
                self._check_open()
                batch = self._next_batch(groups)
                found = [answer for group in batch for answer in group.take_answers()]
                batch = [group for group in batch if group.questions]
                computed = self._forward(batch, self._known.memory_bytes > 0) if batch else []
            for group, group_masses in zip(batch, computed, strict=True):
                found += zip(group.prompt_indices, group_masses, strict=True)
            for indices, mass in found:
                for index in indices:
                    masses[index] = mass[:, : len(prompts[index].prefix) + 1]
        return cast(list[Mass], masses)

    def remember(self, prompts: Sequence[Prompt]) -> int:
        """See `AttentionBackend.remember`.

        Raises:
            InvalidInputError: Nothing is kept, as the settings or the model have it.
            StorageError: The disk is full, or the folder cannot be written to.
        """
        if not self._keeps:
            raise InvalidInputError(
                "nothing can be kept of documents: this model's positions depend on the length of "
                "the whole prompt"
            )
        if not (self._known.memory_bytes or self._known.writes):
            raise InvalidInputError(
                "document_cache has no room for documents, neither in memory nor on disk"
            )
        groups = PromptGroup.collect(prompts)
        groups = self._in_order(
            [group for group in groups if not self._known.is_written(group.key)]
        )
        written = dropped = 0
        while groups:
            with self._lock:
                self._check_open()
                batch = self._next_batch(groups)
                computed = self._forward(batch, keep=True)
                if self._known.writes:
                    for group, masses in zip(batch, computed, strict=True):
                        if group.known is not None:
                            asked = (question.tobytes() for question in group.questions)
                            answers = dict(zip(asked, masses, strict=True))
                            written += self._known.write(group.key, group.known, answers)
                    dropped += self._known.trim()
        if dropped:
            warnings.warn(
                f"{dropped} remembered documents were dropped, those unused for longest: there is "
                "no room on disk for all. Raise DocumentCache(disk_bytes=...)",
                stacklevel=4,
            )
        return written

    def forget(self) -> None:
        """See `AttentionBackend.forget`."""
        with self._lock:
            self._known.clear()

    def close(self) -> None:
        """Free the model's memory."""
        with self._lock:
            self._closed = True
            self._known.clear()
            self._free()

    @abstractmethod
    def _forward(self, groups: Sequence[PromptGroup], keep: bool) -> list[list[Mass]]:
        """One pass over groups; per group, head mass of the prompt of each question.

        With ``keep``, a group knows its opening afterwards, and `_known` has it.
        """

    @abstractmethod
    def _fits(self, groups: Sequence[PromptGroup]) -> bool:
        """Whether one pass holds several groups."""

    @abstractmethod
    def _free(self) -> None:
        """Let go of the model."""

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the model was closed while a call was waiting for it")

    def _in_order(self, groups: list[PromptGroup]) -> list[PromptGroup]:
        """Groups of a kind and of a length beside each other.

        In whichever order the documents come, batches are the same, and so is what rounding does.
        """
        return sorted(
            groups,
            key=lambda group: (self._known.is_known(group.key), len(group.opening), group.key),
        )

    def _next_batch(self, groups: list[PromptGroup]) -> list[PromptGroup]:
        """Take as many of ``groups`` as one pass holds, at least one."""
        batch: list[PromptGroup] = []
        held = 0
        while groups:
            group = groups[0]
            group.known = group.known or self._known.get(group.key)
            held += group.known.size() if group.known else 0
            # What comes from disk may be more than memory is to hold of it.
            room = held <= max(self._known.memory_bytes, MOST_HELD_BYTES)
            if batch and not (room and self._fits([*batch, group])):
                break
            batch.append(groups.pop(0))
        return batch
