"""Evaluation: measures of several methods on the same candidates, and their differences."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from core_rerank_integrations._internal.progress import progress_bar
from core_rerank_integrations.backends.loading import allows_adapter
from core_rerank_integrations.errors import InvalidInputError, requires_extra
from core_rerank_integrations.method.windows import Candidates
from core_rerank_integrations.models.resolve import resolve
from core_rerank_integrations.reranker import CoReReranker
from core_rerank_integrations.research.collection import Collection, Qrels, ScoredRun, load_run
from core_rerank_integrations.research.measures import (
    MAIN_MEASURE,
    Measured,
    ReliabilityBin,
    means_of,
    measure,
    reliability,
)
from core_rerank_integrations.research.methods import (
    JointReranker,
    Method,
    head_count_methods,
    named_method,
)
from core_rerank_integrations.research.options import EvaluationOptions
from core_rerank_integrations.settings import RerankerSettings


@dataclass
class MethodResult:
    """Results of one method.

    Attributes:
        method: The method.
        measured: Measures per query.
        rankings: Documents and scores per query.
        seconds: Wall time of a rerank, of the queries that were timed.
        p_value: Two-sided paired t-test of nDCG@10 against the first stage; ``None`` for the
            first stage itself.
        reliability: Reliability of the probabilities; empty if the method has none.
    """

    method: Method
    measured: Measured
    rankings: ScoredRun
    seconds: list[float] = field(default_factory=list)
    p_value: float | None = None
    reliability: list[ReliabilityBin] = field(default_factory=list)

    @property
    def means(self) -> dict[str, float]:
        """Means of the measures over queries."""
        return means_of(self.measured)

    def values(self) -> list[float]:
        """Return nDCG@10 of every query, in the order of `measured`."""
        return [values[MAIN_MEASURE] for values in self.measured.values()]


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`.

    Attributes:
        results: One for each method.
        about: Collection, model, date and the like, for the head of a report.
        curve: The head set that was tried at several numbers of heads, if any.
    """

    results: list[MethodResult]
    about: dict[str, str | int]
    curve: str | None = None


def evaluate(options: EvaluationOptions, *, show_progress: bool = False) -> Evaluation:
    """Measure a first stage and head sets on the same candidates, and test the difference.

    Methods with the same prompts share one pass of the model.

    Args:
        options: The data, the methods and the model.
        show_progress: Whether to show a progress bar on standard error.

    Raises:
        InvalidInputError: A file cannot be read, two methods have one name, no method has heads,
            or options of the runtime do not belong together.
        HeadSetError: A method names no head set of this model.
        ModelError: The model cannot be found, downloaded, or read exactly.
    """
    collection = Collection.load(options.data, options.split, partial=True)
    run = {
        query: ranking[: options.candidates]
        for query, ranking in load_run(options.run, collection).items()
    }
    queries = list(collection.queries)[: options.queries]
    model = resolve(options.model)
    adapts = allows_adapter(options.backend)
    methods = [
        method if isinstance(method, Method) else named_method(method, model, allows_adapter=adapts)
        for method in options.methods
    ]
    if options.curve is not None:
        methods += head_count_methods(options.curve, model)
    methods = [
        replace(method, heads=method.heads.with_documents_per_prompt(options.documents_per_prompt))
        if method.heads
        else method
        for method in methods
    ]
    counts = Counter(method.name for method in methods)
    if repeated := sorted(name for name, count in counts.items() if count > 1):
        raise InvalidInputError(f"methods named twice: {', '.join(repeated)}")
    if not any(method.heads for method in methods):
        raise InvalidInputError("name at least one method beside the first stage")
    joint = JointReranker(model, methods, RerankerSettings.checked(**options.runtime))
    try:
        progress = progress_bar(show_progress, "Reading")
        rankings = joint.rank(collection, run, queries, progress)
    finally:
        joint.close()
    results = compare(collection.qrels, methods, rankings)
    timed = [collection.candidates(query, run.get(query, ())) for query in queries[: options.timed]]
    for result in results:
        heads = result.method.heads
        if timed and heads is not None and "@" not in result.method.name:
            heads = heads.model_copy(update={"model": model.model_id})  # They were checked before.
            with CoReReranker(options.model, heads, **options.runtime) as reranker:
                result.seconds = _seconds(reranker, timed)
    judged = {document for grades in collection.qrels.values() for document in grades}
    about: dict[str, str | int] = {
        "collection": f"{options.data.name}, {options.split}",
        "queries": len(queries),
        "first stage": f"{options.run.name}, {options.candidates} candidates",
        "judged documents outside the corpus": len(judged - collection.passages.keys()),
        "model": str(options.model),
        "documents per prompt": options.documents_per_prompt or "each head set's own",
        "backend and dtype": f"{options.backend}, {options.dtype}",
        "date": time.strftime("%Y-%m-%d"),
    }
    return Evaluation(results, about, options.curve)


def compare(
    qrels: Qrels, methods: Sequence[Method], rankings: Mapping[str, ScoredRun]
) -> list[MethodResult]:
    """Measure the rankings of every method, and test them against the first stage's.

    Args:
        qrels: Relevance grades.
        methods: The methods.
        rankings: Documents and scores by method and query.
    """
    with requires_extra("eval"):
        from scipy.stats import ttest_rel
    results = []
    for method in methods:
        ranked = rankings[method.name]
        ids = {query: [document for document, _ in pairs] for query, pairs in ranked.items()}
        judged = {query: qrels[query] for query in ranked}
        result = MethodResult(method, measure(judged, ids), ranked)
        calibration = method.heads and method.heads.scoring.calibration
        if calibration and method.first_stage is None:
            pairs = [(query, *pair) for query, pairs in ranked.items() for pair in pairs]
            result.reliability = reliability(
                calibration.probabilities(np.array([score for _, _, score in pairs])),
                [judged[query].get(document, 0) > 0 for query, document, _ in pairs],
            )
        results.append(result)
    first_stage = next((result for result in results if result.method.heads is None), None)
    for result in results:
        if first_stage is not None and result is not first_stage:
            values, baseline = result.values(), first_stage.values()
            # The test is undefined if the values are equal in every query.
            result.p_value = (
                1.0 if values == baseline else float(ttest_rel(values, baseline).pvalue)
            )
    return results


def _seconds(reranker: CoReReranker, lists: Sequence[Candidates]) -> list[float]:
    """Measure the wall time of a rerank of each list, after one rerank that does not count."""
    seconds = []
    for query, documents, _ in (lists[-1], *lists):
        start = time.perf_counter()
        reranker.score(query, documents)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]
