"""`CoReReranker`: a query and its candidates in, ranked results out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, get_args

import numpy as np

from core_rerank_integrations.checks import (
    check_abstention,
    check_count,
    check_documents,
    check_request,
    check_scores,
    check_seconds,
    check_threshold,
)
from core_rerank_integrations.errors import ClosedError, InvalidInputError
from core_rerank_integrations.evidence import evidence_in
from core_rerank_integrations.heads import HeadSet, default_head_set, named_head_set
from core_rerank_integrations.loading import chosen_backend, load_reader
from core_rerank_integrations.models import DEFAULT_MODEL, LocalModel, model_shape, resolve
from core_rerank_integrations.progress import tracked
from core_rerank_integrations.prompt import PromptTemplate
from core_rerank_integrations.reading import Candidates, Reader, ScoredList, layout_of
from core_rerank_integrations.results import RerankResult
from core_rerank_integrations.rule import FirstStage, Ranked, Threshold
from core_rerank_integrations.scoring import (
    Scores,
    best_places,
    prior_of_order,
    prior_of_scores,
)
from core_rerank_integrations.settings import RerankerSettings
from core_rerank_integrations.store import DocumentCache
from core_rerank_integrations.tracing import rerank_span

CONCURRENT_CALLS = 32
"""Calls of `arerank` that are under way at once; more wait their turn."""
Heads = HeadSet | str | Path | Sequence[tuple[int, int]]


class CoReReranker:
    """Reranks documents by what a language model's contrastive retrieval heads attend to.

    One prefill of a prompt that holds all documents and then the query, cut off above the
    highest head; no training and no generation (arXiv 2510.02219).

    Instances may be shared by threads and event loops, and are context managers.

    Examples:
        >>> reranker = CoReReranker()
        >>> reranker.rerank("who invented the telephone?", ["a recipe", "Bell's patent"], top_n=1)
        [RerankResult(index=1, score=..., document="Bell's patent")]

    Args:
        model: An alias (``core-rerank models list``), a hub id, a model folder or a GGUF file.
        heads: The heads to read: a `HeadSet`, the name of a shipped one, the path of a head set
            file, or a list of (layer, head); ``None`` takes the set shipped for the model.
        backend: ``openvino``, for CPUs; ``transformers``; ``vllm``, an engine cut above the highest
            head; ``vllm-shared``, an engine that also generates; or ``auto``: OpenVINO on a CPU,
            where it is installed and runs the model, else Transformers. ``repr`` says which.
        dtype: ``float32``, ``bfloat16``, ``float16``, ``int8`` (OpenVINO), or ``auto``: bfloat16 on
            CUDA and on processors that have it, else float32; with vLLM the checkpoint's own.
        device: A torch device; ``None`` takes CUDA where there is one. vLLM chooses by itself.
        window: Most documents ranked in one prompt; ``None`` takes the head set's, and where
            that names none, as many as the context holds. ``1`` ranks each document by itself:
            its score then depends on no other document, and a long one is ranked by its best
            passage.
        max_document_tokens: Longer documents are cut to this; ``None`` cuts only what does not
            fit the model's context by itself, and nothing with ``window=1``. A cut gives a
            `DocumentTruncatedWarning`.
        document_cache: How much is kept of documents that were read, in memory and on disk, so
            that the next question about them costs its own tokens alone; ``None`` for the defaults
            of `DocumentCache`. vLLM keeps documents in a cache of its own.
        template: Name of a prompt template or a `PromptTemplate`; ``None`` takes the head
            set's, else that of the head set shipped for the model, else the model's chat
            template.
        engine_args: Further arguments for vLLM's engine, as vLLM names them.
        engine: For ``vllm-shared``: a running `AsyncLLM` of your own to share, made with the
            ``worker_extension_cls`` that `backends.vllm.shared` names; it stays yours to stop.
        reader: A `Reader` of your own in place of all that says what runs the model and with
            which prompts; it must run this model with these heads, and stays yours to close.

    Attributes:
        settings: What it was made with.
        heads: The heads it reads, under the rule that holds for it.
        backend: The name of the backend that was chosen.

    Raises:
        InvalidInputError: An argument has no meaning.
        HeadSetError: No head set for the model, or one that does not belong to it.
        ModelError: The model is not to be had, or cannot be read exactly.
    """

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        heads: Heads | None = None,
        *,
        backend: str = "auto",
        dtype: str = "auto",
        device: str | None = None,
        window: int | None = None,
        max_document_tokens: int | None = None,
        document_cache: DocumentCache | None = None,
        template: str | PromptTemplate | None = None,
        engine_args: Mapping[str, Any] | None = None,
        engine: Any = None,
        reader: Reader | None = None,
    ) -> None:
        if isinstance(heads, Sequence) and not isinstance(heads, str):
            HeadSet.from_pairs(heads)  # What is wrong with a list is said best there.
        self.settings = RerankerSettings.checked(
            model=model,
            heads=heads,
            backend=backend,
            dtype=dtype,
            device=device,
            window=window,
            max_document_tokens=max_document_tokens,
            document_cache=document_cache,
            template=template,
            engine_args=engine_args,
        )
        if engine is not None and (backend != "vllm-shared" or engine_args):
            raise InvalidInputError(
                "an engine of your own is for backend='vllm-shared', and without engine_args: "
                "it has its arguments already"
            )
        given = (backend, dtype, device, document_cache, template)
        if reader is not None and given != ("auto", "auto", None, None, None):
            raise InvalidInputError(
                "a reader of your own has its backend, dtype, device, document cache and template "
                "already; leave them out"
            )
        self._given = {"engine": engine, "reader": reader}
        local_model = resolve(model)
        self.model = str(model)
        self.heads = _head_set(heads, local_model)
        self.heads.check(local_model.model_id, model_shape(local_model.config()))
        if window is not None:
            self.heads = self.heads.in_windows_of(window)
        self._layout = layout_of(self.heads, max_document_tokens)
        self.backend = (
            type(reader.backend).__name__
            if reader
            else chosen_backend(backend, local_model, self.heads, dtype, device)
        )
        self._load = partial(
            load_reader,
            self.backend,
            local_model,
            self.heads,
            dtype,
            device,
            template,
            engine_args,
            engine,
            document_cache,
        )
        self._reader: Reader | None = reader or self._load()
        self._executor = ThreadPoolExecutor(CONCURRENT_CALLS, "core-rerank")

    @property
    def reader(self) -> Reader:
        """What reads the prompts.

        Raises:
            ClosedError: This reranker was closed.
        """
        if self._reader is None:
            raise ClosedError("this CoReReranker is closed; make a new one")
        return self._reader

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        top_n: int | None = None,
        score_threshold: Threshold = None,
        ranked: Ranked = False,
        first_stage_scores: Sequence[float] | None = None,
        max_seconds: float | None = None,
        evidence: bool = False,
    ) -> list[RerankResult]:
        """Rank ``documents`` by their relevance to ``query``.

        Args:
            query: What is asked; not empty.
            documents: The candidates; of equals, the first stays first.
            top_n: Results to return at most; ``None`` returns all.
            score_threshold: Results of a lower probability are left out; where the heads are
                not calibrated, of a lower score. ``"auto"`` leaves out all where `answerable`
                says less than `auto_threshold`, and else none.
            ranked: Whether the documents come in the order of a first stage, its best first:
                ``True``, or what that stage is, ``"bm25"`` or ``"vectors"``. Their ranks then
                count as much as the head set says.
            first_stage_scores: The first stage's own scores, one per document, higher is
                better. Where the head set knows what to make of them, they count in place of
                the ranks that ``ranked=True`` stands for.
            max_seconds: Time for reading documents, the first ones first. Those that do not get
                their turn come back behind the others, in the order they came in, whatever the
                threshold, with ``reranked=False``. At least one prompt is read, however long it
                takes; ``None`` reads everything.
            evidence: Whether to tell which sentences of each result speak for it. It takes no
                further pass of the model.

        Returns:
            Results sorted by score, best first.

        Raises:
            InvalidInputError: The query is empty or too long, a document is not a string,
                ``top_n`` is less than 1, ``score_threshold`` is no probability, or ``"auto"``
                with heads that do not know, the first stage's scores are not one number per
                document, or ``max_seconds`` is not above 0.
        """
        check_count("top_n", top_n)
        check_seconds(max_seconds)
        check_threshold(score_threshold, self.heads.rule)
        candidates = check_request((query, documents))
        prior = self._prior(len(documents), ranked, first_stage_scores)
        with rerank_span(self.model, query, candidates.documents, top_n) as finish:
            (scored,) = self._score([candidates], max_seconds, evidence)
            results = self._results(candidates, scored, prior, top_n, score_threshold)
            finish(results)
        return results

    def rerank_batch(
        self,
        requests: Iterable[tuple[str, Sequence[str]]],
        top_n: int | None = None,
        score_threshold: Threshold = None,
        ranked: Ranked = False,
    ) -> list[list[RerankResult]]:
        """`rerank` for several (query, documents) pairs, run through the model together."""
        check_count("top_n", top_n)
        check_threshold(score_threshold, self.heads.rule)
        lists = [check_request(request) for request in requests]
        priors = [self._prior(len(candidates.documents), ranked) for candidates in lists]
        return [
            self._results(candidates, scored, prior, top_n, score_threshold)
            for candidates, scored, prior in zip(lists, self._score(lists), priors, strict=True)
        ]

    def score(self, query: str, documents: Sequence[str], ranked: Ranked = False) -> list[float]:
        """One score per document, in the order of ``documents``; see `RerankResult.score`."""
        candidates = check_request((query, documents))
        prior = self._prior(len(documents), ranked)
        (scored,) = self._score([candidates])
        scores: list[float] = (scored.scores + prior).tolist()
        return scores

    async def arerank(
        self,
        query: str,
        documents: Sequence[str],
        top_n: int | None = None,
        score_threshold: Threshold = None,
        ranked: Ranked = False,
        first_stage_scores: Sequence[float] | None = None,
        max_seconds: float | None = None,
        evidence: bool = False,
    ) -> list[RerankResult]:
        """`rerank` without blocking the event loop; usable from any loop."""
        _ = self.reader  # A closed reranker has no threads left to say so.
        call = partial(
            self.rerank,
            query,
            documents,
            top_n,
            score_threshold,
            ranked,
            first_stage_scores,
            max_seconds,
            evidence,
        )
        # With the caller's context, so that traces know what this is a part of.
        return await asyncio.get_running_loop().run_in_executor(
            self._executor, copy_context().run, call
        )

    @property
    def auto_threshold(self) -> float:
        """What ``score_threshold="auto"`` asks of `answerable`.

        It was chosen so that few lists with something relevant come back empty, for saying
        nothing is the worse mistake; so many without come back all the same.

        Raises:
            InvalidInputError: The heads do not know.
        """
        return check_abstention(self.heads.rule).threshold

    def answerable(self, results: Sequence[RerankResult]) -> float:
        """How probable it is that a list holds something relevant.

        By how far the best probability stands above the others; see `Abstention`. Half of the
        lists that this was fitted on had their relevant document taken out.

        Args:
            results: Of one list, all of them, in any order. What was not read has no part in it.

        Raises:
            InvalidInputError: The heads do not know.
        """
        return check_abstention(self.heads.rule).probability(
            [result.probability for result in results if result.probability is not None]
        )

    def remember(self, documents: Sequence[str], show_progress: bool = False) -> int:
        """Read documents before anything is asked about them, and keep them on disk.

        A later rerank, in this process or another one with the same model and heads, then runs
        the question's own tokens alone. Meant for when a knowledge base is built. Documents that
        lie there already are not read again. With vLLM, whose cache is its own, this warms that.

        Args:
            documents: Their texts, as they will be reranked.
            show_progress: Whether a bar on standard error says how far this is.

        Returns:
            Bytes that were written.

        Raises:
            InvalidInputError: A document is not a string; or prompts hold several documents
                (``window`` other than 1), and what is read of one depends on the others.
            StorageError: They cannot be written.
        """
        texts = check_documents(documents)
        if self._layout.size != 1:
            raise InvalidInputError(
                f"documents can be remembered where each is read by itself; the heads "
                f"{self.heads.name!r} want several in a prompt: take others, or pass window=1"
            )
        written = self.reader.remember(texts, self._layout)
        if show_progress:
            written = tracked(written, len(texts), "Reading documents")
        return sum(written)

    def restart(self) -> None:
        """Load the model anew, say after vLLM's engine died. Waiting calls end with an error.

        Raises:
            ClosedError: This reranker was closed.
            InvalidInputError: The backend or its engine is the caller's own.
        """
        if any(own is not None for own in self._given.values()):
            raise InvalidInputError(
                "this reranker runs on a reader or an engine of your own; start that anew and "
                "make a new reranker with it"
            )
        self.reader.close()
        self._reader = self._load()

    def close(self) -> None:
        """Free the model. Later calls raise `ClosedError`; closing twice is harmless."""
        reader, self._reader = self._reader, None
        if reader is not None:
            self._executor.shutdown()
            if reader is not self._given["reader"]:
                reader.close()

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
        return _rebuild, ({**dict(self.settings), **self._given},)

    def __copy__(self) -> CoReReranker:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> CoReReranker:
        """Frameworks copy their components; the model is shared."""
        return self

    def __repr__(self) -> str:
        return (
            f"CoReReranker(model={self.model!r}, heads={self.heads.name!r}, "
            f"backend={self.backend!r})"
        )

    def _score(
        self,
        lists: Sequence[Candidates],
        max_seconds: float | None = None,
        evidence: bool = False,
    ) -> list[ScoredList]:
        return self.reader.score(lists, self.heads, self._layout, max_seconds, evidence)

    def _prior(
        self, count: int, ranked: Ranked, first_stage_scores: Sequence[float] | None = None
    ) -> Scores:
        if ranked not in (False, True, *get_args(FirstStage)):
            raise InvalidInputError(
                f"ranked must be True, False, {' or '.join(map(repr, get_args(FirstStage)))}, "
                f"got {ranked!r}"
            )
        if first_stage_scores is not None:
            given = check_scores(first_stage_scores, count)
            weight = self.heads.rule.first_stage_score_weight
            if weight is not None and isinstance(ranked, bool):
                return prior_of_scores(given, weight)
        return prior_of_order(count, self.heads.rule.order_weight(ranked))

    def _results(
        self,
        candidates: Candidates,
        scored: ScoredList,
        prior: Scores,
        top_n: int | None,
        score_threshold: Threshold,
    ) -> list[RerankResult]:
        scores = scored.scores + prior
        probabilities: list[float | None] = [None] * len(scores)
        reranked = np.isfinite(scores).tolist()
        if self.heads.rule.calibration is not None:
            calibrated = self.heads.rule.calibration.probabilities(scored.scores).tolist()
            probabilities = [
                probability if read else None
                for probability, read in zip(calibrated, reranked, strict=True)
            ]
        results = [
            RerankResult(
                place,
                float(scores[place]),
                candidates.documents[place],
                probabilities[place],
                scored.passages[place],
                reranked[place],
            )
            for place in best_places(scores, len(scores))
        ]
        if score_threshold == "auto":
            found = self.answerable(results) >= self.auto_threshold
            results = [result for result in results if found or not result.reranked]
        elif score_threshold is not None:
            results = [
                result
                for result in results
                if result.relevance >= score_threshold or not result.reranked
            ]
        results = results[:top_n]
        if not any(scored.tokens):
            return results
        return [
            replace(result, evidence=evidence_in(result.document, scored.tokens[result.index]))
            for result in results
        ]


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
