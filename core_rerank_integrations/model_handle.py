"""The life cycle of a loaded model: load, restart, close."""

from __future__ import annotations

import threading
from collections.abc import Callable

from core_rerank_integrations.errors import ClosedError, InvalidInputError
from core_rerank_integrations.scorer import AttentionScorer


class ModelHandle:
    """Own a loaded model. Thread-safe.

    Args:
        load: Loads the model.
        scorer: A loaded scorer of the caller, used instead. It is never closed here.
        can_restart: ``False`` if the model runs in an engine of the caller.
    """

    def __init__(
        self,
        load: Callable[[], AttentionScorer],
        scorer: AttentionScorer | None = None,
        can_restart: bool = True,
    ) -> None:
        self._load = load
        self._owns_scorer = scorer is None
        self._can_restart = can_restart and scorer is None
        self._restarting = threading.Lock()
        self._scorer: AttentionScorer | None = scorer or load()

    @property
    def scorer(self) -> AttentionScorer:
        """The loaded scorer.

        Raises:
            ClosedError: The handle is closed.
        """
        scorer = self._scorer
        if scorer is None:
            raise ClosedError("this CoReReranker is closed; make a new one")
        return scorer

    def restart(self) -> None:
        """Load the model again. Waiting calls end with an error.

        Raises:
            ClosedError: The handle is closed.
            InvalidInputError: The scorer or its engine belongs to the caller.
        """
        if not self._can_restart:
            raise InvalidInputError(
                "this reranker uses a scorer or an engine of your own; start that again and "
                "make a new reranker with it"
            )
        with self._restarting:
            self.scorer.close()
            self._scorer = self._load()

    def close(self) -> None:
        """Free the model. Closing twice has no effect."""
        scorer, self._scorer = self._scorer, None
        if scorer is not None and self._owns_scorer:
            scorer.close()
