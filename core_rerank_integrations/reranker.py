"""`CoReReranker`: a query and its documents in, ranked results out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Self, Unpack

from core_rerank_integrations._internal.cancellation import run_in_thread
from core_rerank_integrations._internal.closing import Closeable
from core_rerank_integrations._internal.progress import progress_bar
from core_rerank_integrations.backends.base import BackendStats
from core_rerank_integrations.backends.loading import allows_adapter, chosen_backend
from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.heads.head_set import HeadSet
from core_rerank_integrations.heads.scoring_config import FirstStage
from core_rerank_integrations.heads.shipped import Heads, head_set_for
from core_rerank_integrations.method.templates import PromptTemplate
from core_rerank_integrations.method.windows import Candidates
from core_rerank_integrations.model_handle import ModelHandle
from core_rerank_integrations.models.aliases import DEFAULT_MODEL
from core_rerank_integrations.models.local_model import LocalModel, model_shape
from core_rerank_integrations.models.resolve import resolve
from core_rerank_integrations.ranking import (
    check_abstention,
    check_candidates,
    check_documents,
    check_options,
    check_requests,
    rank,
)
from core_rerank_integrations.results import RerankResults
from core_rerank_integrations.scorer import AttentionScorer, load_scorer
from core_rerank_integrations.settings import (
    DocumentCache,
    RerankerSettings,
    RerankKeywords,
    RerankOptions,
)
from core_rerank_integrations.tracing import rerank_spans

MAX_CONCURRENT_CALLS = 32
"""Number of `arerank` calls that run at once; more calls wait."""


class CoReReranker(Closeable):
    """Rerank documents by the attention of a language model's contrastive retrieval heads.

    One forward pass over the documents and the query, up to the layer of the highest head; no
    generation (arXiv 2510.02219). Instances are thread-safe, work with any event loop, and are
    context managers (``with`` and ``async with``). A process does not inherit them by a fork.

    Examples:
        >>> reranker = CoReReranker()
        >>> reranker.rerank("who invented the telephone?", ["a recipe", "Bell's patent"], top_n=1)
        [RerankResult(index=1, score=..., document="Bell's patent")]

    Args:
        model: An alias (``core-rerank models list``), a hub id, a model folder or a GGUF file.
        heads: The heads to read: a `HeadSet`, the name of a shipped one, the path of a head set
            file, or a list of (layer, head). ``None`` selects the set shipped for the model.
        backend: ``openvino``, for CPUs; ``transformers``; ``vllm``, an engine that only reranks;
            ``vllm-shared``, an engine that also generates; or ``auto``: OpenVINO on a CPU if it
            is installed and supports the model, else Transformers. ``repr`` shows the choice.
        dtype: ``float32``, ``bfloat16``, ``float16``, ``int8`` (OpenVINO), or ``auto``: bfloat16
            on CUDA and on processors that support it, else float32. With vLLM, ``auto`` is the
            checkpoint's own.
        device: A torch device; ``None`` selects CUDA if available. Not for vLLM.
        documents_per_prompt: Maximum number of documents in one prompt; ``None`` selects the head
            set's, or as many as the context holds. With ``1`` a document's score does not depend
            on other documents, and a long document is ranked by its best passage.
        max_document_tokens: Longer documents are truncated to this length, with a
            `DocumentTruncatedWarning`. ``None`` truncates only documents that do not fit the
            context, and none with ``documents_per_prompt=1``.
        max_query_tokens: Longer queries raise `InvalidInputError`. Every token of a query is read
            for every document, which takes tens of seconds for a query of a page.
        document_cache: Size and folder of the cache of documents that were read. ``None`` selects
            the defaults of `DocumentCache`. vLLM caches documents in its own cache.
        template: Name of a prompt template, or a `PromptTemplate`. ``None`` selects the head
            set's, else that of the head set shipped for the model, else the chat template.
        engine_args: More arguments for vLLM's engine.
        revision: Branch, tag or commit of a hub id; ``None`` selects main.
        token: Access token of the Hugging Face hub; ``None`` selects ``HF_TOKEN``, or the one that
            is stored on this machine.
        local_files_only: Whether nothing is downloaded, so that a missing model is an error.
        engine: For ``vllm-shared``: a running `AsyncLLM` of your own, created with the
            ``worker_extension_cls`` of `backends.vllm.caller.shared`. It is never shut down here.

    Attributes:
        settings: The settings it was created with.
        model: The model it was created with, as text.
        heads: The heads it reads.
        backend: Name of the backend that was selected.

    Raises:
        InvalidInputError: An argument is invalid.
        HeadSetError: There is no head set for the model, or it belongs to another model.
        ModelError: The model cannot be found, downloaded, or read exactly.
    """

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        heads: Heads | None = None,
        *,
        backend: str = "auto",
        dtype: str = "auto",
        device: str | None = None,
        documents_per_prompt: int | None = None,
        max_document_tokens: int | None = None,
        max_query_tokens: int = 1024,
        document_cache: DocumentCache | None = None,
        template: str | PromptTemplate | None = None,
        engine_args: Mapping[str, Any] | None = None,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        engine: Any = None,
    ) -> None:
        settings = RerankerSettings.checked(
            model=model,
            heads=heads,
            backend=backend,
            dtype=dtype,
            device=device,
            documents_per_prompt=documents_per_prompt,
            max_document_tokens=max_document_tokens,
            max_query_tokens=max_query_tokens,
            document_cache=document_cache,
            template=template,
            engine_args=engine_args,
            revision=revision,
            token=token,
            local_files_only=local_files_only,
        )
        if engine is not None and (backend != "vllm-shared" or engine_args):
            raise InvalidInputError(
                "engine requires backend='vllm-shared', without engine_args: a running engine has "
                "its arguments already"
            )
        self._set_up(settings, engine, None)

    @classmethod
    def from_scorer(
        cls,
        scorer: AttentionScorer,
        model: str | Path = DEFAULT_MODEL,
        heads: Heads | None = None,
        *,
        documents_per_prompt: int | None = None,
        max_document_tokens: int | None = None,
    ) -> Self:
        """Create a reranker on a loaded model, for example to compare head settings.

        Args:
            scorer: A scorer that runs ``model`` with these heads. It is never closed here.
            model: As for the constructor.
            heads: As for the constructor.
            documents_per_prompt: As for the constructor.
            max_document_tokens: As for the constructor.
        """
        reranker = cls.__new__(cls)
        settings = RerankerSettings.checked(
            model=model,
            heads=heads,
            documents_per_prompt=documents_per_prompt,
            max_document_tokens=max_document_tokens,
        )
        reranker._set_up(settings, None, scorer)
        return reranker

    def _set_up(
        self, settings: RerankerSettings, engine: Any, scorer: AttentionScorer | None
    ) -> None:
        self.settings = settings
        self.model = str(settings.model)
        self._engine = engine
        model, heads = checked_model(settings)
        self.heads = heads.with_documents_per_prompt(settings.documents_per_prompt)
        self._layout = self.heads.scoring.layout(
            settings.max_document_tokens, settings.max_query_tokens
        )
        self.backend = (
            type(scorer.backend).__name__ if scorer else chosen_backend(settings, model, heads)
        )
        load = partial(load_scorer, self.backend, settings, model, self.heads, engine)
        self._handle = ModelHandle(load, scorer, can_restart=engine is None)
        self._executor = ThreadPoolExecutor(MAX_CONCURRENT_CALLS, "core-rerank")

    @property
    def scorer(self) -> AttentionScorer:
        """The scorer that runs the model.

        Raises:
            ClosedError: The reranker is closed.
        """
        return self._handle.scorer

    @property
    def is_alive(self) -> bool:
        """Whether calls are answered.

        ``False`` after vLLM's engine has died, until `restart` has started another one, and after
        `close`.
        """
        return self._handle.is_alive

    @property
    def stats(self) -> BackendStats:
        """Counters of the backend: tokens run, prefixes cached, bytes."""
        return self.scorer.backend.stats

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        first_stage_scores: Sequence[float] | None = None,
        **options: Unpack[RerankKeywords],
    ) -> RerankResults:
        """Rank documents by their relevance to a query.

        Args:
            query: The query; not empty.
            documents: Texts of the documents; ties keep their order.
            first_stage_scores: The first stage's score of each document; higher is better. Used
                instead of the order if the head set has a weight for scores and none for this
                kind of first stage.
            **options: Fields of `RerankOptions`: ``top_n``, ``score_threshold``, ``min_score``,
                ``first_stage``, ``max_seconds``, ``evidence``.

        Returns:
            Results sorted by score, best first.

        Raises:
            InvalidInputError: The query is empty or too long, a document is not a string, an
                option is invalid or the heads do not support it, or ``first_stage_scores`` does
                not hold one number per document.
        """
        (results,) = self._rank([check_candidates(query, documents, first_stage_scores)], options)
        return results

    def rerank_batch(
        self,
        requests: Iterable[tuple[str, Sequence[str]]],
        *,
        first_stage_scores: Sequence[Sequence[float]] | None = None,
        **options: Unpack[RerankKeywords],
    ) -> list[RerankResults]:
        """Rank several lists together, which is faster than one by one.

        Args:
            requests: (query, documents) pairs.
            first_stage_scores: The first stage's scores of each list; see `rerank`.
            **options: Fields of `RerankOptions`, for all lists. ``max_seconds`` limits the time
                of all lists together.

        Returns:
            The results of each list; see `rerank`.

        Raises:
            InvalidInputError: See `rerank`; or ``first_stage_scores`` does not hold one list of
                scores per request.
        """
        return self._rank(check_requests(requests, first_stage_scores), options)

    async def arerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        first_stage_scores: Sequence[float] | None = None,
        **options: Unpack[RerankKeywords],
    ) -> RerankResults:
        """Rank documents without blocking the event loop; see `rerank`.

        A cancelled call stops after the model's current pass.
        """
        _ = self.scorer  # After close() the executor would raise a RuntimeError.
        call = partial(
            self.rerank, query, documents, first_stage_scores=first_stage_scores, **options
        )
        return await run_in_thread(call, self._executor)

    def score(
        self,
        query: str,
        documents: Sequence[str],
        *,
        first_stage: FirstStage | None = None,
        first_stage_scores: Sequence[float] | None = None,
    ) -> list[float]:
        """Return one score per document, in input order; see `RerankResult.score`."""
        results = self.rerank(
            query, documents, first_stage=first_stage, first_stage_scores=first_stage_scores
        )
        return [result.score for result in sorted(results, key=lambda result: result.index)]

    @property
    def abstention_threshold(self) -> float:
        """Answerability below which ``score_threshold="auto"`` returns nothing.

        It is chosen so that few of the lists with a relevant document on which it was fitted come
        back empty: at most 1% with ``fit-smollm2-135m-instruct``, 4% with the default heads. Other
        lists may lose more, and many lists without a relevant document still pass.

        Raises:
            InvalidInputError: The head set has no abstention.
        """
        return check_abstention(self.heads.scoring).threshold

    def cache_documents(self, documents: Sequence[str], *, show_progress: bool = False) -> int:
        """Read documents before a question is asked, and cache them on disk.

        A later rerank, in this process or in another one with the same model and heads, then
        computes only the tokens of the question. Documents that are on disk already are not read
        again. On vLLM this fills the engine's prefix cache; nothing is written.

        Args:
            documents: Texts of the documents, as they will be reranked.
            show_progress: Whether to show a progress bar on standard error.

        Returns:
            Number of bytes written.

        Raises:
            InvalidInputError: A document is not a string, or prompts hold several documents, so
                that nothing can be cached for one of them.
            StorageError: The cache cannot be written.
        """
        texts = check_documents(documents)
        if self._layout.documents_per_prompt != 1:
            raise InvalidInputError(
                f"the heads {self.heads.name!r} read several documents per prompt, so documents "
                "cannot be cached; use other heads, or pass documents_per_prompt=1"
            )
        written = self.scorer.cache_documents(texts, self._layout)
        return sum(progress_bar(show_progress, "Reading documents")(written, len(texts)))

    def clear_cache(self) -> None:
        """Drop all documents from memory; the files on disk stay."""
        self.scorer.clear_cache()

    def restart(self) -> None:
        """Load the model again, for example after vLLM's engine died.

        Waiting calls end with an error. Threads that call this at the same time share one restart.
        If it fails, later calls raise a `BackendError` that says why, and it can be called again.

        Raises:
            ClosedError: The reranker is closed.
            InvalidInputError: The scorer or its engine is the caller's own.
            BackendError: The restart that another thread had begun failed.
        """
        self._handle.restart()

    def close(self) -> None:
        """Free the model.

        Waiting and later calls raise `ClosedError`. Closing twice has no effect, and neither has
        closing in a fork of the process.
        """
        if not self._handle.is_in_fork:
            self._handle.close()  # Ends waiting calls. They may need the loop that runs this.
            self._executor.shutdown(wait=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings; the model is loaded again after unpickling.

        Raises:
            InvalidInputError: The reranker uses an engine of the caller.
        """
        if self._engine is not None:
            raise InvalidInputError(
                "a reranker on a running engine of your own cannot be pickled: other processes "
                "need an engine and a reranker of their own"
            )
        return _rebuild, (dict(self.settings),)

    def __repr__(self) -> str:
        return (
            f"CoReReranker(model={self.model!r}, heads={self.heads.name!r}, "
            f"backend={self.backend!r})"
        )

    def _rank(self, lists: list[Candidates], options: RerankKeywords) -> list[RerankResults]:
        checked = RerankOptions.checked(**options)
        check_options(checked, self.heads.scoring)
        with rerank_spans(self.model, lists, checked.top_n) as finish:
            scored = self.scorer.score(
                lists,
                self.heads,
                self._layout,
                max_seconds=checked.max_seconds,
                evidence=checked.evidence,
            )
            results = [
                rank(candidates, own, self.heads.scoring, checked)
                for candidates, own in zip(lists, scored, strict=True)
            ]
            finish(results)
        return results


def checked_model(settings: RerankerSettings) -> tuple[LocalModel, HeadSet]:
    """Return the model that settings name, and its heads; download the model if needed.

    Raises:
        InvalidInputError: The model's name is invalid.
        HeadSetError: There is no head set for the model, or it belongs to another model.
        ModelError: The model cannot be found, downloaded, or read exactly.
    """
    model = resolve(
        settings.model,
        revision=settings.revision,
        token=settings.token,
        local_files_only=settings.local_files_only,
    )
    heads = head_set_for(
        settings.heads, model.model_id, allows_adapter=allows_adapter(settings.backend)
    )
    heads.check(model.model_id, model_shape(model.config()))
    return model, heads


def _rebuild(arguments: dict[str, Any]) -> CoReReranker:
    return CoReReranker(**arguments)
