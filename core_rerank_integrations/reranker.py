"""`CoReReranker`: a query and its candidates in, ranked results out."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from cachetools import LRUCache

from core_rerank_integrations.backends.base import AttentionBackend
from core_rerank_integrations.errors import (
    ClosedError,
    InvalidInputError,
)
from core_rerank_integrations.heads import HeadSet, default_head_set, named_head_set
from core_rerank_integrations.loading import BACKENDS, load_backend, load_encoder
from core_rerank_integrations.models import DEFAULT_MODEL, LocalModel, model_shape, resolve
from core_rerank_integrations.prompt import (
    PromptTemplate,
)
from core_rerank_integrations.results import RerankResult, ranked
from core_rerank_integrations.scoring import (
    Mass,
    Scores,
    document_scores,
    second_round_groups,
    with_first_stage,
    with_second_round,
)
from core_rerank_integrations.windows import Window, WindowPlanner

CONCURRENT_CALLS = 32
"""Calls of `arerank` that are under way at once; more wait their turn."""
BASELINE_CACHE_TOKENS = 4_000_000
"""Prompt tokens whose ``N/A`` attention mass is kept, at four bytes each."""

Heads = HeadSet | str | Path | Sequence[tuple[int, int]]


class CoReReranker:
    """Reranks documents by what a language model's contrastive retrieval heads attend to.

    One prefill of a prompt that holds all documents and then the query, cut off above the
    highest head; no training and no generation (arXiv 2510.02219).

    >>> reranker = CoReReranker()
    >>> reranker.rerank("who invented the telephone?", ["a recipe", "Bell's patent"], top_n=1)
    [RerankResult(index=1, score=..., document="Bell's patent")]

    Instances may be shared by threads and event loops, and are context managers.

    Args:
        model: An alias (``core-rerank models list``), a hub id, a model folder or a GGUF file.
        heads: The heads to read: a `HeadSet`, the name of a shipped one, the path of a head set
            file, or a list of (layer, head); ``None`` takes the set shipped for the model.
        backend: ``transformers``; ``vllm``, an engine cut above the highest head; ``vllm-shared``,
            an engine that also generates; or ``auto``, which is ``transformers``. Or an
            `AttentionBackend` of your own, which must run this model with these heads.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: bfloat16 on CUDA, float32 on
            CPU; with vLLM the checkpoint's own.
        device: A torch device; ``None`` takes CUDA where there is one. vLLM chooses by itself.
        window: Most documents ranked in one prompt; ``None`` takes the head set's, and where
            that names none, as many as the context holds. ``1`` ranks each document by itself:
            its score then depends on no other document.
        max_document_tokens: Longer documents are cut to this; ``None`` cuts only what does not
            fit the model's context by itself. A cut gives a `DocumentTruncatedWarning`.
        template: Name of a prompt template or a `PromptTemplate`; ``None`` takes the head
            set's, else that of the head set shipped for the model, else the model's chat
            template.
        first_stage_order: Whether documents come in the order of the first stage, its best
            first. Their ranks then count as much as the head set's ``first_stage_weight`` says,
            which ranks better than the heads alone; otherwise the order only breaks ties.
        engine_args: Further arguments for vLLM's engine, as vLLM names them.
        engine: For ``vllm-shared``: a running `AsyncLLM` of your own to share, made with the
            ``worker_extension_cls`` that `backends.vllm.shared` names; it stays yours to stop.

    Raises:
        InvalidInputError: An argument has no meaning.
        HeadSetError: No head set for the model, or one that does not belong to it.
        ModelError: The model is not to be had, or cannot be read exactly.
    """

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        heads: Heads | None = None,
        backend: str | AttentionBackend = "auto",
        dtype: str = "auto",
        device: str | None = None,
        window: int | None = None,
        max_document_tokens: int | None = None,
        template: str | PromptTemplate | None = None,
        first_stage_order: bool = False,
        engine_args: Mapping[str, Any] | None = None,
        engine: Any = None,
    ) -> None:
        _check_count("window", window)
        _check_count("max_document_tokens", max_document_tokens)
        if isinstance(backend, str) and backend not in BACKENDS:
            raise InvalidInputError(
                f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}"
            )
        if engine_args and backend not in ("vllm", "vllm-shared"):
            raise InvalidInputError(f"engine_args are for the vLLM backends, not {backend!r}")
        if engine is not None and (backend != "vllm-shared" or engine_args):
            raise InvalidInputError(
                "an engine of your own is for backend='vllm-shared', and without engine_args: "
                "it has its arguments already"
            )
        self._arguments = {
            "model": model,
            "heads": heads,
            "backend": backend,
            "dtype": dtype,
            "device": device,
            "window": window,
            "max_document_tokens": max_document_tokens,
            "template": template,
            "first_stage_order": first_stage_order,
            "engine_args": engine_args,
            "engine": engine,
        }
        local_model = resolve(model)
        self.model = str(model)
        self.heads = _head_set(heads, local_model)
        self.heads.check(local_model.model_id, model_shape(local_model.config()))
        self.window = window or self.heads.window
        self.first_stage_order = first_stage_order
        self._encoder = load_encoder(local_model, template or self.heads.template)
        self._load: Callable[[], AttentionBackend] | None = None
        self._backend: AttentionBackend | None
        if isinstance(backend, str):
            self._load = partial(
                load_backend, backend, local_model, self.heads, dtype, device, engine_args, engine
            )
            self._backend = self._load()
        else:
            self._backend = backend
        self._planner = WindowPlanner(self._encoder, self._backend.max_context, max_document_tokens)
        self._baselines: LRUCache[bytes, Mass] = LRUCache(BASELINE_CACHE_TOKENS, getsizeof=len)
        self._baselines_lock = threading.Lock()
        self._executor = ThreadPoolExecutor(CONCURRENT_CALLS, "core-rerank")

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments this reranker was made with."""
        return dict(self._arguments)

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        top_n: int | None = None,
        score_threshold: float | None = None,
    ) -> list[RerankResult]:
        """Rank ``documents`` by their relevance to ``query``.

        Args:
            query: What is asked; not empty.
            documents: The candidates, best first if they come ranked: ties keep this order.
            top_n: Results to return at most; ``None`` returns all.
            score_threshold: Results below this score are left out.

        Returns:
            Results sorted by score, best first.

        Raises:
            InvalidInputError: The query is empty or too long, a document is not a string, or
                ``top_n`` is less than 1.
        """
        return self.rerank_batch([(query, documents)], top_n, score_threshold)[0]

    def rerank_batch(
        self,
        requests: Iterable[tuple[str, Sequence[str]]],
        top_n: int | None = None,
        score_threshold: float | None = None,
    ) -> list[list[RerankResult]]:
        """`rerank` for several (query, documents) pairs, run through the model together."""
        _check_count("top_n", top_n)
        _check_threshold(score_threshold)
        checked = [_check_request(request) for request in requests]
        return [
            ranked(scores, request.documents, top_n, score_threshold)
            for request, scores in zip(checked, self._scores(checked), strict=True)
        ]

    def score(self, query: str, documents: Sequence[str]) -> list[float]:
        """One score per document, in the order of ``documents``."""
        return self._scores([_check_request((query, documents))])[0]

    async def arerank(
        self,
        query: str,
        documents: Sequence[str],
        top_n: int | None = None,
        score_threshold: float | None = None,
    ) -> list[RerankResult]:
        """`rerank` without blocking the event loop; usable from any loop."""
        self._check_open()
        return await asyncio.get_running_loop().run_in_executor(
            self._executor, self.rerank, query, documents, top_n, score_threshold
        )

    def restart(self) -> None:
        """Load the model anew, say after vLLM's engine died. Waiting calls end with an error.

        Raises:
            ClosedError: This reranker was closed.
            InvalidInputError: The backend or its engine is the caller's own.
        """
        if self._load is None or self._arguments["engine"] is not None:
            raise InvalidInputError(
                "this reranker runs on a backend or an engine of your own; start that anew and "
                "make a new reranker with it"
            )
        self._check_open().close()
        self._backend = self._load()

    def close(self) -> None:
        """Free the model. Later calls raise `ClosedError`; closing twice is harmless."""
        backend, self._backend = self._backend, None
        if backend is not None:
            self._executor.shutdown()
            backend.close()

    def __enter__(self) -> CoReReranker:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the constructor's arguments: the model is loaded anew where it arrives."""
        return _rebuild, (self._arguments,)

    def __copy__(self) -> CoReReranker:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> CoReReranker:
        """Frameworks copy their components; the model is shared."""
        return self

    def __repr__(self) -> str:
        return f"CoReReranker(model={self.model!r}, heads={self.heads.name!r})"

    def _check_open(self) -> AttentionBackend:
        if self._backend is None:
            raise ClosedError("this CoReReranker is closed; make a new one")
        return self._backend

    def _scores(self, requests: Sequence[_Request]) -> list[list[float]]:
        first = self._read(requests, self.window, self.heads.reverse)
        scores = [reading.scores for reading in first]
        if self.first_stage_order:
            weight = self.heads.first_stage_weight
            scores = [with_first_stage(request_scores, weight) for request_scores in scores]
        if self.heads.second_round and self.window != 1:
            contests = {
                place: second_round_groups(scores[place], self.heads.second_round, self.window)
                for place, reading in enumerate(first)
                if reading.prompts > 1
            }
            finals = [
                _Request(requests[place].query, tuple(first[place].shown[i] for i in group))
                for place, groups in contests.items()
                for group in groups
            ]
            remaining = iter(self._read(finals, None, reverse=True))
            for place, groups in contests.items():
                second = [next(remaining).scores for _ in groups]
                scores[place] = with_second_round(
                    scores[place], groups, second, self.heads.second_round_weight
                )
        return [request_scores.tolist() for request_scores in scores]

    def _read(
        self, requests: Sequence[_Request], size: int | None, reverse: bool
    ) -> list[_Reading]:
        """Score by the heads alone, in prompts of at most ``size`` documents."""
        backend = self._check_open()
        planned = [
            self._planner.windows(request.query, request.documents, size, reverse)
            for request in requests
        ]
        windows = [window for request_windows in planned for window in request_windows]
        baselines = self._known_baselines(windows)
        missing = {
            window.key: self._planner.baseline(window)
            for window in windows
            if window.key not in baselines
        }
        prompts = [window.prompt for window in windows]
        masses = backend.attention_mass([*prompts, *missing.values()]) if prompts else []
        for (key, twin), mass in zip(missing.items(), masses[len(prompts) :], strict=True):
            baselines[key] = mass[: twin.documents_stop]
        self._keep_baselines({key: baselines[key] for key in missing})

        remaining = iter(masses)
        readings = []
        for request, request_windows in zip(requests, planned, strict=True):
            reading = _Reading(
                np.zeros(len(request.documents)), list(request.documents), len(request_windows)
            )
            for window, mass in zip(request_windows, remaining, strict=False):
                reading.scores[window.indices] = document_scores(
                    mass,
                    baselines[window.key],
                    window.prompt.document_spans,
                    self.heads.drop_outliers,
                )
                for index, shown in zip(window.indices, window.documents, strict=True):
                    reading.shown[index] = shown
            readings.append(reading)
        return readings

    def _known_baselines(self, windows: Sequence[Window]) -> dict[bytes, Mass]:
        with self._baselines_lock:
            return {
                window.key: mass
                for window in windows
                if (mass := self._baselines.get(window.key)) is not None
            }

    def _keep_baselines(self, masses: dict[bytes, Mass]) -> None:
        with self._baselines_lock:
            for key, mass in masses.items():
                if len(mass) <= self._baselines.maxsize:
                    self._baselines[key] = mass


class _Request(NamedTuple):
    query: str
    documents: tuple[str, ...]


class _Reading(NamedTuple):
    """What one round says of a request: scores, and documents as far as they were shown."""

    scores: Scores
    shown: list[str]
    prompts: int


def _rebuild(arguments: dict[str, Any]) -> CoReReranker:
    return CoReReranker(**arguments)


def _head_set(heads: Heads | None, model: LocalModel) -> HeadSet:
    if heads is None:
        return default_head_set(model.model_id)
    if isinstance(heads, HeadSet):
        return heads
    if isinstance(heads, Path):
        return HeadSet.load(heads)
    if isinstance(heads, str):
        return named_head_set(heads)
    return HeadSet.from_pairs(heads, model=model.model_id)


def _check_request(request: tuple[str, Sequence[str]]) -> _Request:
    query, documents = request
    if not isinstance(query, str):
        raise InvalidInputError(f"the query must be a string, got {type(query).__name__}")
    if not query.strip():
        raise InvalidInputError(f"the query is empty: {query!r}; there is nothing to rank by")
    if isinstance(documents, str) or not isinstance(documents, Sequence):
        raise InvalidInputError(
            f"documents must be a list of strings, got {type(documents).__name__}"
        )
    for index, document in enumerate(documents):
        if not isinstance(document, str):
            raise InvalidInputError(
                f"document {index} must be a string, got {type(document).__name__}"
            )
    return _Request(query, tuple(documents))


def _check_count(name: str, count: int | None) -> None:
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise InvalidInputError(f"{name} must be at least 1, or None, got {count!r}")


def _check_threshold(threshold: float | None) -> None:
    if threshold is not None and (
        isinstance(threshold, bool)
        or not isinstance(threshold, int | float)
        or math.isnan(threshold)
    ):
        raise InvalidInputError(f"score_threshold must be a number or None, got {threshold!r}")
