"""Ways to order candidates, compared in one pass of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import cast

import numpy as np

from core_rerank_integrations.backends.loading import load_scorer
from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.heads.head_set import HeadSet, named_head_set, shipped_head_sets
from core_rerank_integrations.heads.scoring_config import Ranked
from core_rerank_integrations.method.scoring import Mass, Scores, best_indices, rank_prior
from core_rerank_integrations.method.windows import Layout
from core_rerank_integrations.models.resolve import LocalModel, model_shape
from core_rerank_integrations.research.collection import Collection, Run
from core_rerank_integrations.scorer import (
    Candidates,
    Progress,
    collected,
    layout_of,
    no_progress,
)

FIRST_STAGE = "first-stage"
RANKED: dict[str, Ranked] = {FIRST_STAGE: True, "bm25": "bm25", "vectors": "vectors"}
"""What stands behind the plus of a method's name."""
HEAD_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Numbers of best heads that `head_count_methods` tries."""


@dataclass(frozen=True)
class Method:
    """A way to order candidates; without heads, the first stage's own."""

    name: str
    heads: HeadSet | None = None
    ranked: Ranked = False
    """Whether the first stage's order counts beside the heads, and what it is; see `Ranked`."""

    def with_documents_per_prompt(self, size: int) -> Method:
        """The same heads in prompts of ``size`` documents; see `HeadSet.with_documents_per_prompt`."""
        return (
            self
            if self.heads is None
            else replace(self, heads=self.heads.with_documents_per_prompt(size))
        )


def named_method(text: str, model: LocalModel) -> Method:
    """The method that ``text`` names.

    Args:
        text: ``first-stage``; ``icr``, all heads; or a kind of head set that is shipped for the
            model, the name of one, or a file. ``@8`` behind it takes the best eight of its ranking,
            ``+first-stage``, ``+bm25`` or ``+vectors`` lets the order count.
        model: The model whose heads are meant.

    Raises:
        HeadSetError: There is no such head set, or it belongs to another model.
        InvalidInputError: What stands behind @ is no number.
    """
    if text == FIRST_STAGE:
        return Method(text)
    _, plus, kind = text.rpartition("+")
    ranked = RANKED.get(kind, False) if plus else False
    suffix = f"+{kind}" if ranked else ""
    name, _, count = text.removesuffix(suffix).partition("@")
    shape = model_shape(model.config())
    kinds = {
        head_set.kind: head_set
        for head_set in reversed(shipped_head_sets().values())
        if model.model_id is not None
        and model.model_id in (head_set.model, *head_set.model_aliases)
    }
    if name == "icr":
        heads = HeadSet.every(shape)
    elif name in kinds:
        heads = kinds[name]
    else:
        heads = named_head_set(name)
        name = heads.name  # A file's path would be no name for a run.
    heads.check(model.model_id, shape)
    label = f"{name}{f'@{count}' if count else ''}{suffix}"
    if count:
        if not count.isdigit():
            raise InvalidInputError(f"expected a number of heads after @, got {text!r}")
        heads = heads.top(int(count))
    return Method(label, heads, ranked)


def head_count_methods(name: str, model: LocalModel) -> list[Method]:
    """The best 1, 2, 4, ... heads of a head set's ranking, and all of them.

    Raises:
        InvalidInputError: The head set has no ranking.
    """
    heads = named_method(name, model).heads
    if heads is None or not heads.provenance.ranked_heads:
        raise InvalidInputError(f"--curve needs a head set with a ranking, and {name} has none")
    every = len(heads.provenance.ranked_heads)
    counts = [*(count for count in HEAD_COUNTS if count < every), every]
    return [named_method(f"{name}@{count}", model) for count in counts]


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
        self._reader = load_scorer(
            backend, model, HeadSet.from_pairs(places), dtype, device, template
        )

    def scores(
        self, lists: Sequence[Candidates], tracked: Progress = no_progress
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
        tracked: Progress,
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
                of_prompts[name][place] = weighed.scores(heads.scoring.drop_outliers)
        places = iter(range(len(prompts)))
        for of_list, (_, documents), windows in zip(scores, lists, planned, strict=True):
            own = list(islice(places, len(windows)))
            for method in methods:
                values = [of_prompts[method.name][place] for place in own]
                weight = sets[method.name].scoring.rank_weight_for(method.ranked)
                prior = rank_prior(len(documents), weight)
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
            order = best_indices(np.asarray(values), len(candidates))
            rankings.setdefault(name, {})[query] = [
                (candidates[place], float(values[place])) for place in order
            ]
    return rankings
