"""Methods side by side: how good their rankings are, and what they bring over the first stage."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from core_rerank_integrations._internal.progress import tracked
from core_rerank_integrations.errors import InvalidInputError, requires_extra
from core_rerank_integrations.models.resolve import DEFAULT_MODEL, resolve
from core_rerank_integrations.reranker import CoReReranker
from core_rerank_integrations.research.collection import Collection, Qrels, Run, load_run
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
    rank_all,
)
from core_rerank_integrations.scorer import no_progress


@dataclass
class MethodResult:
    """What one method did with every query.

    Attributes:
        method: Which.
        measured: Values per query.
        rankings: (document id, score) per query id, best first.
        seconds: Wall time of a rerank, of the queries that were timed.
        p_value: Of a two-sided paired t-test of nDCG@10 against the first stage; ``None`` for
            the first stage itself.
        reliability: Of the probabilities, where the method gives any.
    """

    method: Method
    measured: Measured
    rankings: dict[str, list[tuple[str, float]]]
    seconds: list[float] = field(default_factory=list)
    p_value: float | None = None
    reliability: list[ReliabilityBin] = field(default_factory=list)

    @property
    def means(self) -> dict[str, float]:
        """Means over queries."""
        return means_of(self.measured)

    def values(self, name: str = MAIN_MEASURE) -> list[float]:
        """One measure of every query, in the order of `measured`."""
        return [values[name] for values in self.measured.values()]


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        results: One for each method.
        about: Collection, model, date and the like, for the head of a report.
        curve: The head set that was tried at several numbers of heads, if any.
    """

    results: list[MethodResult]
    about: dict[str, str | int]
    curve: str | None = None


def evaluate(
    collection: str | Path,
    run: str | Path,
    methods: Sequence[str | Method] = ("first-stage", "core", "fit+first-stage"),
    model: str | Path = DEFAULT_MODEL,
    *,
    split: str = "test",
    candidates: int = 20,
    queries: int | None = None,
    window: int | None = None,
    curve: str | None = None,
    timed: int = 0,
    backend: str = "auto",
    dtype: str = "auto",
    show_progress: bool = False,
) -> Evaluation:
    """Measure a first stage and head sets on the same candidates, and test the difference.

    Methods that want their prompts alike share one pass of the model.

    Args:
        collection: Folder in the layout of BEIR.
        run: TREC run of the first stage: the candidates.
        methods: Names, see `named_method`, or methods of your own.
        model: Alias, hub id, folder or GGUF file.
        split: Which judgments.
        candidates: How many of a query's candidates are ranked.
        queries: The first queries only; ``None`` for all.
        window: Documents a prompt; ``None`` for each head set's own.
        curve: A head set whose ranking is tried at 1, 2, 4, ... heads.
        timed: Queries by which each method is timed by itself.
        backend: As for `CoReReranker`.
        dtype: As for `CoReReranker`.
        show_progress: Whether a bar on standard error says how far this is.

    Raises:
        InvalidInputError: A file cannot be read, two methods have one name, or no method has heads.
        HeadSetError: A method names no head set of this model.
        ModelError: The model is not to be had, or cannot be read exactly.
    """
    folder, path = Path(collection), Path(run)
    loaded = Collection.load(folder, split, partial=True)
    judged = {document for grades in loaded.qrels.values() for document in grades}
    ranked = {query: ranking[:candidates] for query, ranking in load_run(path, loaded).items()}
    asked = list(loaded.queries)[:queries]
    local_model = resolve(model)
    chosen = [
        method if isinstance(method, Method) else named_method(method, local_model)
        for method in methods
    ]
    if curve is not None:
        chosen += head_count_methods(curve, local_model)
    if window is not None:
        chosen = [method.with_documents_per_prompt(window) for method in chosen]
    names = [method.name for method in chosen]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise InvalidInputError(f"methods named twice: {', '.join(sorted(repeated))}")
    if not any(method.heads for method in chosen):
        raise InvalidInputError("name at least one method beside the first stage")
    joint = JointReranker(local_model, chosen, backend, dtype)
    try:
        shown = partial(tracked, what="Reading") if show_progress else no_progress
        rankings = rank_all(loaded, ranked, partial(joint.scores, tracked=shown), asked)
    finally:
        joint.close()
    results = compare(loaded.qrels, chosen, rankings)
    for result in results:
        heads = result.method.heads
        if timed and heads is not None and "@" not in result.method.name:
            heads = heads.model_copy(update={"model": None})  # The folder has no hub id.
            with CoReReranker(
                local_model.path, heads=heads, backend=backend, dtype=dtype
            ) as reranker:
                result.seconds = _seconds(reranker, loaded, ranked, asked[:timed])
    about: dict[str, str | int] = {
        "collection": f"{folder.name}, {split}",
        "queries": len(asked),
        "first stage": f"{path.name}, {candidates} candidates",
        "judged documents outside the corpus": len(judged - loaded.passages.keys()),
        "model": str(model),
        "window": window or "each head set's own",
        "backend and dtype": f"{backend}, {dtype}",
        "date": time.strftime("%Y-%m-%d"),
    }
    return Evaluation(results, about, curve)


def compare(
    qrels: Qrels,
    methods: Sequence[Method],
    rankings: Mapping[str, Mapping[str, list[tuple[str, float]]]],
) -> list[MethodResult]:
    """Measure every method's rankings, and test them against the first stage's."""
    with requires_extra("eval"):
        from scipy.stats import ttest_rel
    results = []
    for method in methods:
        ranked = dict(rankings[method.name])
        ids = {query: [document for document, _ in pairs] for query, pairs in ranked.items()}
        judged = {query: qrels[query] for query in ranked}
        result = MethodResult(method, measure(judged, ids), ranked)
        calibration = method.heads and method.heads.scoring.calibration
        if calibration and not method.ranked:
            pairs = [(query, *pair) for query, pairs in ranked.items() for pair in pairs]
            result.reliability = reliability(
                calibration.probabilities(np.array([score for _, _, score in pairs])),
                [judged[query].get(document, 0) > 0 for query, document, _ in pairs],
            )
        results.append(result)
    first_stage = next((result for result in results if result.method.heads is None), None)
    for result in results:
        if first_stage is not None and result is not first_stage:
            ours, theirs = result.values(), first_stage.values()
            # Equal in every query: the test is undefined, and nothing differs.
            result.p_value = 1.0 if ours == theirs else float(ttest_rel(ours, theirs).pvalue)
    return results


def _seconds(
    reranker: CoReReranker, collection: Collection, run: Run, queries: Sequence[str]
) -> list[float]:
    """Wall time of a rerank of each query's candidates; one uncounted rerank goes before."""
    seconds = []
    for query in [queries[-1], *queries]:
        texts = [collection.passages[document].content for document in run.get(query, [])]
        start = time.perf_counter()
        reranker.score(collection.queries[query], texts)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]
