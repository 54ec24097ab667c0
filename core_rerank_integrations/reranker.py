"""`CoReReranker`: a query and its candidates in, ranked results out."""

from __future__ import annotations

import asyncio
import math
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from cachetools import LRUCache

from core_rerank_integrations.backends.base import AttentionBackend
from core_rerank_integrations.errors import (
    ClosedError,
    DocumentTruncatedWarning,
    HeadSetError,
    InvalidInputError,
)
from core_rerank_integrations.heads import HeadSet, default_head_set, named_head_set
from core_rerank_integrations.models import DEFAULT_MODEL, LocalModel, model_shape, resolve
from core_rerank_integrations.prompt import (
    BASELINE_QUERY,
    TEMPLATES,
    Prompt,
    PromptEncoder,
    PromptTemplate,
)
from core_rerank_integrations.results import RerankResult, ranked
from core_rerank_integrations.scoring import Mass, document_scores
from core_rerank_integrations.windows import plan_windows

BACKENDS = ("auto", "transformers", "vllm")
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
        backend: ``transformers``, ``vllm``, or ``auto``, which is ``transformers``; or an
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
        engine_args: Further arguments for vLLM's engine, as vLLM names them.

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
        engine_args: Mapping[str, Any] | None = None,
    ) -> None:
        _check_count("window", window)
        _check_count("max_document_tokens", max_document_tokens)
        if isinstance(backend, str) and backend not in BACKENDS:
            raise InvalidInputError(
                f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}"
            )
        if engine_args and backend != "vllm":
            raise InvalidInputError(f"engine_args are for backend='vllm', not {backend!r}")
        self._arguments = {
            "model": model,
            "heads": heads,
            "backend": backend,
            "dtype": dtype,
            "device": device,
            "window": window,
            "max_document_tokens": max_document_tokens,
            "template": template,
            "engine_args": engine_args,
        }
        self._max_document_tokens = max_document_tokens
        local_model = resolve(model)
        self.model = str(model)
        self.heads = _head_set(heads, local_model)
        self.heads.check(local_model.model_id, model_shape(local_model.config()))
        self.window = window or self.heads.window
        tokenizer = local_model.tokenizer()
        self._encoder = PromptEncoder(
            tokenizer.backend_tokenizer,
            _template(template or _usual_template(self.heads, local_model), tokenizer),
        )
        self._backend: AttentionBackend | None = (
            _load_backend(backend, local_model, self.heads, dtype, device, engine_args)
            if isinstance(backend, str)
            else backend
        )
        self._max_context = self._backend.max_context
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
        backend = self._check_open()
        windows = [
            window
            for number, request in enumerate(requests)
            for window in self._windows(number, request)
        ]
        baselines = self._known_baselines(windows)
        missing = {
            window.key: self._encoder.encode(BASELINE_QUERY, window.documents)
            for window in windows
            if window.key not in baselines
        }
        prompts = [window.prompt for window in windows]
        masses = backend.attention_mass([*prompts, *missing.values()]) if prompts else []
        for (key, twin), mass in zip(missing.items(), masses[len(prompts) :], strict=True):
            baselines[key] = mass[: max(span.stop for span in twin.document_spans)]
        self._keep_baselines({key: baselines[key] for key in missing})

        scores = [[0.0] * len(request.documents) for request in requests]
        for window, mass in zip(windows, masses, strict=False):
            window_scores = document_scores(
                mass, baselines[window.key], window.prompt.document_spans
            )
            for index, score in zip(window.indices, window_scores, strict=True):
                scores[window.request][index] = score
        return scores

    def _windows(self, number: int, request: _Request) -> list[_Window]:
        """The prompts of one request; documents that do not fit are cut, with a warning."""
        if not request.documents:
            return []
        frame = max(
            self._encoder.frame_length(request.query), self._encoder.frame_length(BASELINE_QUERY)
        )
        documents = list(request.documents)
        lengths = self._encoder.document_lengths(documents)
        marker = self._encoder.document_lengths([""])[0]
        budget = self._max_context - frame
        if budget <= marker:
            raise InvalidInputError(
                f"the query leaves no room for a document: with its instruction it takes {frame} "
                f"tokens, and the model's context holds {self._max_context}"
            )
        longest = min(budget - marker, self._max_document_tokens or budget)
        for index, length in enumerate(lengths):
            if length - marker > longest:
                documents[index], dropped = self._encoder.truncate(documents[index], longest)
                lengths[index] = min(longest + marker, length)
                if dropped:
                    warnings.warn(
                        f"document {index} was cut to {longest} tokens; its last {dropped} tokens "
                        "were not ranked. Split long documents, or raise max_document_tokens",
                        DocumentTruncatedWarning,
                        stacklevel=5,
                    )
        windows = []
        for indices in plan_windows(lengths, budget, self.window):
            shown = [documents[index] for index in indices]
            prompt = self._encoder.encode(request.query, shown)
            windows.append(_Window(number, indices, shown, prompt))
        return windows

    def _known_baselines(self, windows: Sequence[_Window]) -> dict[bytes, Mass]:
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


class _Window(NamedTuple):
    """One prompt of a request."""

    request: int
    indices: list[int]
    documents: list[str]
    prompt: Prompt

    @property
    def key(self) -> bytes:
        """What the attention of the ``N/A`` twin depends on: all before the query span."""
        return self.prompt.prefix.tobytes()


def _rebuild(arguments: dict[str, Any]) -> CoReReranker:
    return CoReReranker(**arguments)


def _load_backend(
    name: str,
    model: LocalModel,
    heads: HeadSet,
    dtype: str,
    device: str | None,
    engine_args: Mapping[str, Any] | None,
) -> AttentionBackend:
    if name == "vllm":
        from core_rerank_integrations.backends.vllm.engine import VLLMBackend

        return VLLMBackend(model, heads, dtype=dtype, engine_args=engine_args)
    from core_rerank_integrations.backends.transformers import TransformersBackend

    return TransformersBackend(model, heads, dtype=dtype, device=device)


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


def _usual_template(heads: HeadSet, model: LocalModel) -> str | None:
    if heads.template is not None:
        return heads.template
    try:
        return default_head_set(model.model_id).template
    except HeadSetError:
        return None


def _template(template: str | PromptTemplate | None, tokenizer: Any) -> PromptTemplate:
    if isinstance(template, PromptTemplate):
        return template
    if template is not None:
        if template not in TEMPLATES:
            raise InvalidInputError(
                f"there is no prompt template {template!r}; known are {', '.join(TEMPLATES)}"
            )
        return TEMPLATES[template]
    if not tokenizer.chat_template:
        return TEMPLATES["plain"]

    def render(message: str) -> str:
        text: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
        )
        # The tokenizer puts its begin-of-sequence token in front by itself.
        begins = tokenizer.bos_token and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        return text.removeprefix(tokenizer.bos_token) if begins else text

    return PromptTemplate.from_chat(render)


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
