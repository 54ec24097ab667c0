"""How good rankings are, and what reranking brings over the first stage."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from core_rerank_integrations.errors import InvalidInputError, requires_extra
from core_rerank_integrations.files import write_whole
from core_rerank_integrations.finding.collection import Collection, Qrels, Run, save_run
from core_rerank_integrations.heads import HeadSet, Ranked
from core_rerank_integrations.loading import load_reader
from core_rerank_integrations.models import LocalModel
from core_rerank_integrations.reading import (
    Candidates,
    Tracked,
    collected,
    layout_of,
    untracked,
)
from core_rerank_integrations.reranker import CoReReranker
from core_rerank_integrations.scoring import Mass, Scores, best_places, prior_of_order
from core_rerank_integrations.windows import Layout

MEASURES = ("nDCG@1", "nDCG@5", "nDCG@10", "AP", "RR", "R@5", "R@10")
"""In the notation of ir-measures; their means over queries are known as MAP, MRR and recall."""
MAIN_MEASURE = "nDCG@10"
FIRST_STAGE = "first-stage"
SIGNIFICANT = 0.05
RELIABILITY_BINS = 10

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
    ranked: Ranked = False
    """Whether the first stage's order counts beside the heads, and what it is; see `Ranked`."""

    def in_windows_of(self, size: int) -> Method:
        """The same heads in prompts of ``size`` documents; see `HeadSet.in_windows_of`."""
        return self if self.heads is None else replace(self, heads=self.heads.in_windows_of(size))


class ReliabilityBin(NamedTuple):
    """Candidates of about the same predicted probability.

    Attributes:
        predicted: Mean predicted probability.
        observed: Share of them that is relevant.
        candidates: How many they are.
    """

    predicted: float
    observed: float
    candidates: int


def reliability(
    probabilities: npt.ArrayLike, relevant: npt.ArrayLike, bins: int = RELIABILITY_BINS
) -> list[ReliabilityBin]:
    """Predictions against judgments, in ``bins`` of equal width; empty ones are left out."""
    predicted, judged = np.asarray(probabilities, float), np.asarray(relevant, bool)
    places = np.minimum((predicted * bins).astype(int), bins - 1)
    return [
        ReliabilityBin(
            float(predicted[places == place].mean()),
            float(judged[places == place].mean()),
            int((places == place).sum()),
        )
        for place in np.unique(places)
    ]


def expected_calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Mean distance of predicted and observed, each bin counting by its candidates.

    Naeini et al., 2015, "Obtaining well calibrated probabilities using Bayesian binning".
    """
    total = sum(part.candidates for part in bins)
    return sum(part.candidates * abs(part.predicted - part.observed) for part in bins) / total


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
        return _means(self.measured)

    def values(self, name: str = MAIN_MEASURE) -> list[float]:
        """One measure of every query, in the order of `measured`."""
        return [values[name] for values in self.measured.values()]


class JointReranker:
    """Ranks by several head sets of one model in one pass, for comparisons.

    Scores are those of a `CoReReranker` with the same head set; only the model runs once for
    all that want their prompts alike, as far as the highest head of any.
    """

    def __init__(
        self,
        model: LocalModel,
        methods: Sequence[Method],
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
        places = sorted({(head.layer, head.head) for heads in sets for head in heads.heads})
        self._columns = {place: index for index, place in enumerate(places)}
        template = next((head_set.template for head_set in sets if head_set.template), None)
        self._reader = load_reader(
            backend, model, HeadSet.from_pairs(places), dtype, device, template
        )

    def scores(
        self, lists: Sequence[Candidates], tracked: Tracked = untracked
    ) -> list[dict[str, Scores]]:
        """Of each list by method, one score a document; the first stage's are falling numbers.

        Args:
            lists: Queries and their candidates.
            tracked: Wraps the prompts as they are read, with their number; a progress bar, say.
        """
        scores: list[dict[str, Scores]] = [{} for _ in lists]
        by_layout: dict[Layout | None, list[Method]] = {}
        for method in self._methods:
            layout = None if method.heads is None else layout_of(method.heads)
            by_layout.setdefault(layout, []).append(method)
        for layout, methods in by_layout.items():
            if layout is None:
                for of_list, (_, documents) in zip(scores, lists, strict=True):
                    order = -np.arange(len(documents), dtype=np.float64)
                    of_list.update((method.name, order) for method in methods)
            else:
                self._score(lists, layout, methods, scores, tracked)
        return scores

    def close(self) -> None:
        """Free the model."""
        self._reader.close()

    def _score(
        self,
        lists: Sequence[Candidates],
        layout: Layout,
        methods: Sequence[Method],
        scores: Sequence[dict[str, Scores]],
        tracked: Tracked,
    ) -> None:
        """Add what ``methods``, which want their prompts alike, make of each list."""
        planned = self._reader.plan(lists, layout)
        prompts = [window for windows in planned for window in windows]
        sets = {method.name: cast(HeadSet, method.heads) for method in methods}
        weights = {name: self._weights(heads) for name, heads in sets.items()}
        of_prompts: dict[str, dict[int, Scores]] = {name: {} for name in sets}
        for place, reading in tracked(self._reader.stream(prompts, by_head=True), len(prompts)):
            for name, heads in sets.items():
                weighed = reading.weighed(weights[name])
                of_prompts[name][place] = weighed.scores(heads.drop_outliers)
        places = iter(range(len(prompts)))
        for of_list, (_, documents), windows in zip(scores, lists, planned, strict=True):
            own = list(islice(places, len(windows)))
            for method in methods:
                values = [of_prompts[method.name][place] for place in own]
                weight = sets[method.name].order_weight(method.ranked)
                prior = prior_of_order(len(documents), weight)
                of_list[method.name] = collected(windows, values, len(documents)).scores + prior

    def _weights(self, heads: HeadSet) -> Mass:
        weights = np.zeros(len(self._columns), dtype=np.float32)
        for head in heads.heads:
            weights[self._columns[head.layer, head.head]] = head.weight
        return weights


def rank_all(
    collection: Collection,
    run: Run,
    scores: Callable[[Sequence[Candidates]], Sequence[Mapping[str, Sequence[float] | Scores]]],
    queries: Sequence[str],
) -> dict[str, dict[str, list[tuple[str, float]]]]:
    """Rankings by method and query id.

    Args:
        collection: Texts.
        run: The candidates, best first; a query that it lacks has none.
        scores: Of each list by method, one score per document.
        queries: Query ids.
    """
    lists = [
        Candidates(
            collection.queries[query],
            tuple(collection.passages[document].content for document in run.get(query, [])),
        )
        for query in queries
    ]
    rankings: dict[str, dict[str, list[tuple[str, float]]]] = {}
    for query, of_list in zip(queries, scores(lists), strict=True):
        candidates = run.get(query, [])
        for name, values in of_list.items():
            order = best_places(np.asarray(values), len(candidates))
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
        result = MethodResult(method, measure(judged, ids), ranked)
        calibration = method.heads and method.heads.calibration
        if calibration and not method.ranked:
            pairs = [(query, *pair) for query, pairs in ranked.items() for pair in pairs]
            result.reliability = reliability(
                calibration.probabilities(np.array([score for _, _, score in pairs])),
                [judged[query].get(document, 0) > 0 for query, document, _ in pairs],
            )
        results.append(result)
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
                "reliability": [part._asdict() for part in result.reliability],
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
    lines += [
        f"\nExpected calibration error of {result.method.name}: "
        f"{expected_calibration_error(result.reliability):.3f}"
        for result in results
        if result.reliability
    ]
    lines += [f"\n![{name}]({name})" for name in pictures]
    return "\n".join(lines) + "\n"


def _described(method: Method) -> dict[str, Any] | None:
    if method.heads is None:
        return None
    described: dict[str, Any] = method.heads.model_dump(
        mode="json", exclude_defaults=True, exclude={"ranking"}
    )
    return {**described, "ranked": method.ranked}


def _means(measured: Measured) -> dict[str, float]:
    return {
        name: statistics.fmean(values[name] for values in measured.values()) for name in MEASURES
    }
