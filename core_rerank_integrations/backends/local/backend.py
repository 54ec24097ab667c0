"""The base class of backends that run the model in this process."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from core_rerank_integrations._internal.cancellation import check_cancelled
from core_rerank_integrations._internal.memory import return_freed_memory
from core_rerank_integrations._internal.warnings import warn_caller
from core_rerank_integrations.backends.base import BackendStats, GroupMass, PromptGroup
from core_rerank_integrations.backends.local.prefix_cache import CachedPrefix, PrefixCache
from core_rerank_integrations.errors import ClosedError, InvalidInputError
from core_rerank_integrations.method.prompt import SharedPrefix, TokenIds
from core_rerank_integrations.method.scoring import Mass

MAX_LOADED_BYTES = 1 << 28
"""Maximum size of the prefixes that are read ahead from disk, and of those of one pass if
memory_bytes is lower."""
MAX_QUESTION_TOKENS = 128
"""Maximum number of tokens of the questions that run together after one prefix."""


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


class LocalBackend(ABC):
    """Compute each prefix once, cache it, and run one forward pass at a time.

    Args:
        cache: Cache of prefixes.
        can_cache: ``False`` for RoPE variants whose frequencies depend on the total length, so
            that nothing computed for one prompt is valid in another.
    """

    max_context: int
    is_alive = True
    """See `AttentionBackend.is_alive`. The model is in this process."""

    def __init__(self, cache: PrefixCache, can_cache: bool = True) -> None:
        self._cache = cache
        self._can_cache = can_cache
        self._lock = threading.Lock()
        self._closed = False
        self._tokens_run = self._asked = self._known = 0

    @property
    def identity(self) -> str:
        """See `AttentionBackend.identity`. It is that of the document cache."""
        return self._cache.identity

    @property
    def stats(self) -> BackendStats:
        """See `AttentionBackend.stats`."""
        return BackendStats(
            self._tokens_run, len(self._cache), self._cache.nbytes, self._asked, self._known
        )

    def attention_mass(
        self, groups: Sequence[PromptGroup], weights: Mass | None = None
    ) -> list[GroupMass]:
        """See `AttentionBackend.attention_mass`."""
        jobs = [(index, part) for index, group in enumerate(groups) for part in self._parts(group)]
        baselines: dict[int, Mass] = {}
        own: list[list[Mass]] = [[] for _ in jobs]
        keep = self._cache.memory_bytes > 0
        parts = [part for _, part in jobs]
        waiting = self._sorted([groups[index].prefix for index, _ in jobs], parts)
        loaded: dict[bytes, CachedPrefix] = {}
        while waiting:
            self._read_ahead(waiting, loaded)
            with self._lock:
                batch = self._next_batch(waiting, parts, loaded)
                self._asked += sum(len(parts[job]) for job, _ in batch)
                self._known += sum(len(parts[job]) for job, run in batch if run.cached)
                computed = self._run([run for _, run in batch], keep)
            for (job, run), masses in zip(batch, computed, strict=True):
                stop = run.prefix.context_length + 1
                baseline, *own[job] = (
                    mass[:, :stop] if weights is None else weights @ mass[:, :stop]
                    for mass in masses
                )
                baselines.setdefault(jobs[job][0], baseline)
        questions: list[list[Mass]] = [[] for _ in groups]
        for (index, _), masses in zip(jobs, own, strict=True):
            questions[index] += masses
        return [GroupMass(baselines[index], masses) for index, masses in enumerate(questions)]

    def cache_prefixes(self, prefixes: Sequence[SharedPrefix]) -> int:
        """See `AttentionBackend.cache_prefixes`.

        Raises:
            InvalidInputError: The settings or the model do not allow a cache.
            StorageError: The disk is full, or the folder cannot be written to.
        """
        if not self._can_cache:
            raise InvalidInputError(
                "documents cannot be cached: this model's position embeddings depend on the "
                "length of the whole prompt"
            )
        if not (self._cache.memory_bytes or self._cache.writes):
            raise InvalidInputError(
                "document_cache has no room for documents: raise memory_bytes or disk_bytes"
            )
        prefixes = list({prefix.key: prefix for prefix in prefixes}.values())
        written = dropped = 0
        prefixes = [prefix for prefix in prefixes if not self._cache.touch_file(prefix.key)]
        questions: list[Sequence[TokenIds]] = [()] * len(prefixes)
        waiting = self._sorted(prefixes, questions)
        while waiting:
            with self._lock:
                batch = self._next_batch(waiting, questions, {})
                self._run([run for _, run in batch], keep=True)
            for _, run in batch:
                assert run.cached is not None
                if self._cache.writes:
                    written += self._cache.write(run.prefix.key, run.cached)
            dropped += self._cache.trim() if self._cache.writes else 0
        if dropped:
            warn_caller(
                f"{dropped} cached documents were dropped, the least recently used first: the "
                "disk cache is too small for all. Raise DocumentCache(disk_bytes=...)"
            )
        return written

    def clear_cache(self) -> None:
        """See `AttentionBackend.clear_cache`."""
        with self._lock:
            self._cache.clear()
        return_freed_memory()

    def close(self) -> None:
        """Free the model's memory."""
        self._closed = True  # Waiting calls end before this one gets the lock.
        with self._lock:
            self._cache.clear()
            self._free()
        return_freed_memory()

    @abstractmethod
    def _forward(self, runs: Sequence[PrefixRun], keep: bool) -> list[list[Mass]]:
        """Run one forward pass.

        Args:
            runs: The prefixes and questions.
            keep: Whether to set ``cached`` of each run.

        Returns:
            For each run and question, the attention mass of every head, shape [heads, tokens].
        """

    @abstractmethod
    def _fits(self, runs: Sequence[PrefixRun]) -> bool:
        """Return whether several runs fit into one pass."""

    @abstractmethod
    def _free(self) -> None:
        """Free the model."""

    def _parts(self, group: PromptGroup) -> Iterator[Sequence[TokenIds]]:
        """Divide the questions of a prefix among passes.

        Yields:
            Questions that run together; if there are none, an empty part.
        """
        questions = group.questions
        # In a pass all rows are padded to the longest. A cached prefix costs little to repeat, so
        # it runs with one question a row: rows with two would double all others.
        is_cached = group.prefix.key in self._cache
        start = tokens = 0
        for index, question in enumerate(questions):
            tokens += len(question)
            if index > start and (is_cached or tokens > MAX_QUESTION_TOKENS):
                yield questions[start:index]
                start, tokens = index, len(question)
        yield questions[start:]

    def _sorted(
        self, prefixes: Sequence[SharedPrefix], questions: Sequence[Sequence[TokenIds]]
    ) -> list[tuple[int, SharedPrefix]]:
        """Sort prefixes by whether they are cached, and by the number of tokens to run.

        Rows of a pass then have about the same length. The order of the documents in a call changes
        neither the batches nor the rounding. Cached prefixes come first, before new ones take their
        place in memory.

        Args:
            prefixes: The prefixes.
            questions: The questions of each.

        Returns:
            Index and prefix.
        """

        def order(item: tuple[int, SharedPrefix]) -> tuple[bool, int, int, bytes]:
            index, prefix = item
            is_new = prefix.key not in self._cache
            length = len(prefix.ids)
            tokens = sum(map(len, questions[index])) + is_new * length
            return is_new, tokens, length, prefix.key

        return sorted(enumerate(prefixes), key=order)

    def _read_ahead(
        self, waiting: list[tuple[int, SharedPrefix]], loaded: dict[bytes, CachedPrefix]
    ) -> None:
        """Keep in ``loaded`` what the next passes need from disk, while others use the model."""
        for key in loaded.keys() - {prefix.key for _, prefix in waiting}:
            del loaded[key]
        size = sum(cached.nbytes() for cached in loaded.values())
        for _, prefix in waiting:
            if size > MAX_LOADED_BYTES:
                break
            if prefix.key in loaded or self._cache.in_memory(prefix.key):
                continue
            cached = self._cache.get(prefix.key)
            if cached is None:  # Nothing after it is cached either.
                break
            loaded[prefix.key] = cached
            size += cached.nbytes()

    def _next_batch(
        self,
        waiting: list[tuple[int, SharedPrefix]],
        questions: Sequence[Sequence[TokenIds]],
        loaded: dict[bytes, CachedPrefix],
    ) -> list[tuple[int, PrefixRun]]:
        """Take as many prefixes from ``waiting`` as one pass holds, at least one.

        Args:
            waiting: Index and prefix, sorted; this removes what it takes.
            questions: The questions of each index.
            loaded: Cached prefixes that were read ahead.

        Raises:
            ClosedError: The backend was closed.
        """
        check_cancelled()
        if self._closed:
            raise ClosedError("the model was closed while a call was waiting for it")
        batch: list[tuple[int, PrefixRun]] = []
        size = 0
        while waiting:
            index, prefix = waiting[0]
            cached = loaded.get(prefix.key) or self._cache.get(prefix.key)
            if cached is None and any(prefix.key == run.prefix.key for _, run in batch):
                break  # It is computed once; its other questions run in the next pass.
            run = PrefixRun(prefix, list(questions[index]), cached)
            if cached is None:
                run.questions.append(prefix.baseline)
            size += cached.nbytes() if cached else 0
            has_room = size <= max(self._cache.memory_bytes, MAX_LOADED_BYTES)
            if batch and not (has_room and self._fits([run for _, run in batch] + [run])):
                break
            batch.append((index, run))
            waiting.pop(0)
        return batch

    def _run(self, runs: Sequence[PrefixRun], keep: bool) -> list[list[Mass]]:
        """Run one pass and cache its prefixes.

        Returns:
            For each run, the mass of the baseline and of each question.
        """
        needed = [run for run in runs if run.questions]
        cached_baselines = [run.cached.baseline_mass if run.cached else None for run in runs]
        self._tokens_run += sum(run.tokens for run in needed)
        computed = iter(self._forward(needed, keep) if needed else [])
        results = []
        for run, baseline in zip(runs, cached_baselines, strict=True):
            masses = next(computed) if run.questions else []
            if baseline is None:
                *masses, baseline = masses
                baseline = baseline[:, : run.prefix.context_length + 1].copy()
            if keep and run.cached is not None:
                run.cached.baseline_mass = baseline
                self._cache.put(run.prefix.key, run.cached)
            results.append([baseline, *masses])
        return results
