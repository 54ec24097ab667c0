"""Prompts of one call by what they share: what is the same whatever is asked is read once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from core_rerank_integrations.backends.known_documents import KnownOpening
from core_rerank_integrations.prompt import Prompt, TokenIds
from core_rerank_integrations.scoring import Mass


@dataclass
class PromptGroup:
    """Prompts that are the same up to their questions, each distinct one once.

    Attributes:
        opening: What they share: the prefix, and the instruction that opens the query span.
        rows: How many of its tokens belong to the query span.
        questions: What follows it.
        prompt_indices: Of each question, which prompts of the call ask it.
        known: What was kept of the opening, if it was read before.
    """

    opening: TokenIds
    rows: int
    questions: list[TokenIds] = field(default_factory=list)
    prompt_indices: list[list[int]] = field(default_factory=list)
    known: KnownOpening | None = None

    @property
    def key(self) -> bytes:
        """Tells openings apart."""
        return self.rows.to_bytes(4) + self.opening.tobytes()

    @property
    def tokens(self) -> int:
        """Tokens that have to run."""
        return sum(map(len, self.questions)) + (0 if self.known else len(self.opening))

    def take_answers(self) -> list[tuple[list[int], Mass]]:
        """Drop the questions that were answered before; which prompts ask each, and the answer."""
        answers = {} if self.known is None else self.known.answers
        asked = list(zip(self.questions, self.prompt_indices, strict=True))
        open_ones = [
            (question, indices) for question, indices in asked if question.tobytes() not in answers
        ]
        self.questions = [question for question, _ in open_ones]
        self.prompt_indices = [indices for _, indices in open_ones]
        return [
            (indices, answers[question.tobytes()])
            for question, indices in asked
            if question.tobytes() in answers
        ]

    @classmethod
    def collect(cls, prompts: Sequence[Prompt]) -> list[PromptGroup]:
        """The groups of ``prompts``, in the order of their first ones."""
        groups: dict[bytes, PromptGroup] = {}
        places: dict[tuple[bytes, bytes], list[int]] = {}
        for index, prompt in enumerate(prompts):
            instruction, question = np.split(prompt.suffix, [prompt.instruction])
            group = cls(np.concatenate((prompt.prefix, instruction)), prompt.instruction)
            group = groups.setdefault(group.key, group)
            asked = (group.key, question.tobytes())
            if asked not in places:
                places[asked] = []
                group.questions.append(question)
                group.prompt_indices.append(places[asked])
            places[asked].append(index)
        return list(groups.values())
