"""How good rankings are, and what reranking brings over the first stage."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from core_rerank_integrations.collection import Collection, Qrels, Run, save_run
from core_rerank_integrations.errors import InvalidInputError, requires_extra
from core_rerank_integrations.files import write_whole
from core_rerank_integrations.heads import HeadSet
from core_rerank_integrations.loading import load_backend, load_encoder
from core_rerank_integrations.models import LocalModel
from core_rerank_integrations.reranker import CoReReranker
from core_rerank_integrations.scoring import (
    Scores,
    document_scores,
    second_round_groups,
    with_first_stage,
    with_second_round,
)
from core_rerank_integrations.windows import Window, WindowPlanner

MEASURES = ("nDCG@1", "nDCG@5", "nDCG@10", "AP", "RR", "R@5", "R@10")
"""In the notation of ir-measures; their means over queries are known as MAP, MRR and recall."""
MAIN_MEASURE = "nDCG@10"
FIRST_STAGE = "first-stage"
SIGNIFICANT = 0.05

Measured = dict[str, dict[str, float]]
"""Per query id, the value of each of `MEASURES`."""


def measure(qrels: Qrels, run: Mapping[str, Sequence[str]]) -> Measured:
    """All `MEASURES` for every judged query; a query that the run lacks counts as 0.

    Args:
        qrels: Relevance grades.
        run: Document ids per query id, best first.
    """
    with requires_extra("eval"):
        import ir_measures
    scored = {
        query: {document: -float(rank) for rank, document in enumerate(ranking)}
        for query, ranking in run.items()
    }
    parsed = {ir_measures.parse_measure(name): name for name in MEASURES}
    measured: Measured = {query: dict.fromkeys(MEASURES, 0.0) for query in qrels}
    for value in ir_measures.iter_calc(list(parsed), qrels, scored):
        measured[value.query_id][parsed[value.measure]] = float(value.value)
    return measured


def mean_measures(qrels: Qrels, run: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Means of all `MEASURES` over the judged queries."""
    return _means(measure(qrels, run))


@dataclass(frozen=True)
class Method:
    """A way to order candidates; without heads, the first stage's own."""

    name: str
    heads: HeadSet | None = None
    first_stage_order: bool = False


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
    """

    method: Method
    measured: Measured
    rankings: dict[str, list[tuple[str, float]]]
    seconds: list[float] = field(default_factory=list)
    p_value: float | None = None

    @property
    def means(self) -> dict[str, float]:
        """Means over queries."""
        return _means(self.measured)

    def values(self, name: str = MAIN_MEASURE) -> list[float]:
        """One measure of every query, in the order of `measured`."""
        return [values[name] for values in self.measured.values()]


class JointReranker:
    """Ranks by several head sets of one model in one pass, for comparisons.

    Scores are those of a `CoReReranker` with the same head set; only the model runs once for
    all, as far as the highest head of any (twice where some sets want the documents reversed).
    """

    def __init__(
        self,
        model: LocalModel,
        methods: Sequence[Method],
        window: int | None = None,
        backend: str = "auto",
        dtype: str = "auto",
        device: str | None = None,
    ) -> None:
        sets = [method.heads for method in methods if method.heads is not None]
        if len({head_set.template for head_set in sets if head_set.template}) > 1:
            raise InvalidInputError(
                "the head sets were found with different prompt templates; evaluate them apart"
            )
        self._methods = methods
        self._window = window
        places = sorted({(head.layer, head.head) for heads in sets for head in heads.heads})
        column = {place: index for index, place in enumerate(places)}
        self._weights = {
            method.name: _weights(method.heads, column)
            for method in methods
            if method.heads is not None
        }
        self._orders = sorted({head_set.reverse for head_set in sets})
        template = next((head_set.template for head_set in sets if head_set.template), None)
        encoder = load_encoder(model, template)
        self._backend = load_backend(backend, model, HeadSet.from_pairs(places), dtype, device)
        self._planner = WindowPlanner(encoder, self._backend.max_context)

    def scores(self, query: str, documents: Sequence[str]) -> dict[str, list[float]]:
        """By method, one score a document; the first stage's are falling numbers."""
        order = -np.arange(len(documents), dtype=np.float64)
        scores = {method.name: order for method in self._methods if method.heads is None}
        contests = []
        for reverse in self._orders:
            ranking = [
                (method, heads)
                for method in self._methods
                if (heads := method.heads) is not None and heads.reverse == reverse
            ]
            windows = self._planner.windows(query, documents, self._window, reverse)
            read = self._read(windows, len(documents), [method for method, _ in ranking])
            for method, heads in ranking:
                scores[method.name] = read[method.name]
                if method.first_stage_order:
                    scores[method.name] = with_first_stage(
                        scores[method.name], heads.first_stage_weight
                    )
                if heads.second_round and self._window != 1 and len(windows) > 1:
                    weight = heads.second_round_weight
                    contests.append((method, heads.second_round, weight, windows))
        for method, size, weight, windows in contests:
            shown = {
                index: text
                for window in windows
                for index, text in zip(window.indices, window.documents, strict=True)
            }
            groups = second_round_groups(scores[method.name], size, self._window)
            second = []
            for group in groups:
                texts = [shown[place] for place in group]
                finals = self._planner.windows(query, texts, reverse=True)
                second.append(self._read(finals, len(group), [method])[method.name])
            scores[method.name] = with_second_round(scores[method.name], groups, second, weight)
        return {method.name: scores[method.name].tolist() for method in self._methods}

    def _read(
        self, windows: Sequence[Window], documents: int, methods: Sequence[Method]
    ) -> dict[str, Scores]:
        scores = {method.name: np.zeros(documents) for method in methods}
        prompts = [window.prompt for window in windows]
        twins = [self._planner.baseline(window) for window in windows]
        masses = self._backend.head_mass([*prompts, *twins])
        for window, mass, baseline in zip(windows, masses, masses[len(prompts) :], strict=False):
            for method in methods:
                weights = self._weights[method.name]
                scores[method.name][window.indices] = document_scores(
                    weights @ mass,
                    weights @ baseline,
                    window.prompt.document_spans,
                    method.heads is None or method.heads.drop_outliers,
                )
        return scores

    def close(self) -> None:
        """Free the model."""
        self._backend.close()


def rank_all(
    collection: Collection,
    run: Run,
    scores: Callable[[str, Sequence[str]], Mapping[str, Sequence[float]]],
    queries: Iterable[str],
) -> dict[str, dict[str, list[tuple[str, float]]]]:
    """Rankings by method and query id.

    Args:
        collection: Texts.
        run: The candidates, best first; a query that it lacks has none.
        scores: By method, one score per document of a query's list.
        queries: Query ids.
    """
    rankings: dict[str, dict[str, list[tuple[str, float]]]] = {}
    for query in queries:
        candidates = run.get(query, [])
        texts = [collection.passages[document].content for document in candidates]
        for name, values in scores(collection.queries[query], texts).items():
            order = sorted(range(len(values)), key=lambda place: -values[place])
            rankings.setdefault(name, {})[query] = [
                (candidates[place], float(values[place])) for place in order
            ]
    return rankings


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
        results.append(MethodResult(method, measure(judged, ids), ranked))
    baseline = next((result for result in results if result.method.heads is None), None)
    for result in results:
        if baseline is not None and result is not baseline:
            ours, theirs = result.values(), baseline.values()
            # Equal in every query: the test is undefined, and nothing differs.
            result.p_value = 1.0 if ours == theirs else float(ttest_rel(ours, theirs).pvalue)
    return results


def time_method(
    reranker: CoReReranker, collection: Collection, run: Run, queries: Sequence[str]
) -> list[float]:
    """Wall seconds of a rerank of each query's candidates; one uncounted rerank goes before."""
    seconds = []
    for query in [queries[-1], *queries]:
        texts = [collection.passages[document].content for document in run.get(query, [])]
        start = time.perf_counter()
        reranker.score(collection.queries[query], texts)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def save_report(
    folder: Path, results: Sequence[MethodResult], about: Mapping[str, Any], pictures: Sequence[str]
) -> None:
    """Write ``report.json``, ``report.md`` and a TREC run per method into ``folder``."""
    for result in results:
        name = result.method.name
        save_run(folder / f"{name}.trec", result.rankings, tag=name)
    content = {
        "about": dict(about),
        "methods": {
            result.method.name: {
                "heads": _described(result.method),
                "mean": result.means,
                "p_value": result.p_value,
                "seconds": result.seconds,
                "per_query": result.measured,
            }
            for result in results
        },
    }
    write_whole(folder / "report.json", json.dumps(content, indent=1) + "\n")
    write_whole(folder / "report.md", markdown(results, about, pictures))


def markdown(
    results: Sequence[MethodResult], about: Mapping[str, Any], pictures: Sequence[str] = ()
) -> str:
    """The report as Markdown."""
    lines = ["# Evaluation", ""]
    lines += [f"- {name}: {value}" for name, value in about.items()]
    lines += ["", "| method | heads | layers | " + " | ".join(MEASURES) + " | p | ms a query |"]
    lines += ["| --- " * (len(MEASURES) + 5) + "|"]
    best = max(results, key=lambda result: result.means[MAIN_MEASURE])
    for result in results:
        heads = result.method.heads
        cells = [
            f"**{result.method.name}**" if result is best else result.method.name,
            str(len(heads.heads)) if heads else "",
            str(heads.highest_layer + 1) if heads else "",
            *(f"{result.means[name]:.3f}" for name in MEASURES),
            "" if result.p_value is None else f"{result.p_value:.2g}",
            f"{1000 * statistics.median(result.seconds):.0f}" if result.seconds else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"p: two-sided paired t-test of {MAIN_MEASURE} against the first stage. Times are medians "
        "of one rerank with all its candidates.",
    ]
    lines += [f"\n![{name}]({name})" for name in pictures]
    return "\n".join(lines) + "\n"


def _described(method: Method) -> dict[str, Any] | None:
    if method.heads is None:
        return None
    described: dict[str, Any] = method.heads.model_dump(
        mode="json", exclude_defaults=True, exclude={"ranking"}
    )
    return {**described, "first_stage_order": method.first_stage_order}


def _weights(heads: HeadSet, column: Mapping[tuple[int, int], int]) -> Any:
    weights = np.zeros(len(column), dtype=np.float32)
    for head in heads.heads:
        weights[column[head.layer, head.head]] = head.weight
    return weights


def _means(measured: Measured) -> dict[str, float]:
    return {
        name: statistics.fmean(values[name] for values in measured.values()) for name in MEASURES
    }
