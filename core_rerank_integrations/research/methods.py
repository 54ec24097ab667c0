"""Methods that order candidates, compared in one pass of the model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from core_rerank_integrations._internal.progress import Progress, no_progress
from core_rerank_integrations.backends.loading import chosen_backend
from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.heads.head_set import Adapter, HeadSet
from core_rerank_integrations.heads.scoring_config import FirstStage
from core_rerank_integrations.heads.shipped import default_head_set, named_head_set, sets_of
from core_rerank_integrations.method.list_scores import WindowScores, merge_windows
from core_rerank_integrations.method.scoring import Mass, Scores, best_indices
from core_rerank_integrations.method.windows import Candidates
from core_rerank_integrations.models.local_model import LocalModel, model_shape
from core_rerank_integrations.research.collection import Collection, Run, ScoredRun
from core_rerank_integrations.scorer import AttentionScorer, load_scorer
from core_rerank_integrations.settings import RerankerSettings

FIRST_STAGE = "first-stage"
SUFFIXES: dict[str, FirstStage] = {FIRST_STAGE: "other", "bm25": "bm25", "dense": "dense"}
"""First stage by the suffix of a method's name, after the plus."""
PLAIN_NAME = re.compile(r"^\w[\w.+@-]*$")
MAX_NAME = 100
HEAD_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Numbers of best heads that `head_count_methods` tries."""


@dataclass(frozen=True)
class Method:
    """A way to order candidates.

    Attributes:
        name: Name in reports, runs and their files; see `plain_name`.
        heads: The heads; ``None`` keeps the order of the first stage.
        first_stage: What ordered the candidates; ``None`` if the order does not count.
    """

    name: Annotated[str, Field(pattern=PLAIN_NAME.pattern)]
    heads: HeadSet | None = None
    first_stage: FirstStage | None = None


def plain_name(name: str) -> str:
    """Return a name that can be part of a file name, a tag of a TREC run and a cell of a table."""
    return re.sub(r"[^\w.+@-]+", "-", name).strip("-.")[:MAX_NAME] or "heads"


def named_method(text: str, model: LocalModel, *, allows_adapter: bool = True) -> Method:
    """Return the method of a name.

    Args:
        text: ``first-stage``; ``default``, the model's default head set; ``icr``, all heads; or a
            kind of head set that is shipped for the model, the name of one, or a file. The suffix
            ``@8`` takes the best eight heads of its ranking; then ``+first-stage``, ``+bm25`` or
            ``+dense`` lets the order count.
        model: The model of the heads.
        allows_adapter: Whether the default head set may have an adapter.

    Raises:
        HeadSetError: There is no such head set, or it belongs to another model.
        InvalidInputError: The text after @ is not a number.
    """
    if text == FIRST_STAGE:
        return Method(text)
    name, _, suffix = text.rpartition("+")
    first_stage = SUFFIXES.get(suffix) if name else None
    name, _, count = (name if first_stage else text).partition("@")
    shape = model_shape(model.config())
    kinds = {head_set.kind: head_set for head_set in reversed(sets_of(model.model_id))}
    if name == "default":
        heads = default_head_set(model.model_id, allows_adapter=allows_adapter)
    elif name == "icr":
        heads = HeadSet.every(shape)
    elif name in kinds:
        heads = kinds[name]
    else:
        heads = named_head_set(name)
        name = plain_name(heads.name)
    heads.check(model.model_id, shape)
    if count:
        if not count.isdigit():
            raise InvalidInputError(f"expected a number of heads after @, got {text!r}")
        heads = heads.top(int(count))
    label = name + (f"@{count}" if count else "") + (f"+{suffix}" if first_stage else "")
    return Method(label, heads, first_stage)


def head_count_methods(name: str, model: LocalModel) -> list[Method]:
    """Return methods with the best 1, 2, 4, ... heads of a head set's ranking, and all of them.

    Raises:
        InvalidInputError: The head set has no ranking.
    """
    heads = named_method(name, model).heads
    if heads is None or not heads.provenance.ranked_heads:
        raise InvalidInputError(f"--curve needs a head set with a ranking, and {name} has none")
    every = len(heads.provenance.ranked_heads)
    counts = [*(count for count in HEAD_COUNTS if count < every), every]
    return [named_method(f"{name}@{count}", model) for count in counts]


class _Reader(NamedTuple):
    """The scorer that head sets with the same adapter share.

    Attributes:
        scorer: The scorer.
        columns: Index of each (layer, head) that it reads.
    """

    scorer: AttentionScorer
    columns: dict[tuple[int, int], int]

    def weights(self, heads: HeadSet) -> Mass:
        """Return the weights of a head set, shape [all heads]; 0 for heads that it lacks."""
        weights = np.zeros(len(self.columns), dtype=np.float32)
        for head in heads.heads:
            weights[self.columns[head.layer, head.head]] = head.weight
        return weights


class JointReranker:
    """Rank by several head sets of one model in one pass, to compare them.

    The scores are those of a `CoReReranker` with the same head set. The model runs once for all
    methods with the same adapter and prompts, up to the highest head of any.

    Args:
        model: The model of all head sets.
        methods: The methods.
        settings: Backend, dtype and device.

    Raises:
        InvalidInputError: The head sets were found with different prompt templates.
    """

    def __init__(
        self, model: LocalModel, methods: Sequence[Method], settings: RerankerSettings
    ) -> None:
        self._methods = methods
        self._sets = [method.heads for method in methods if method.heads is not None]
        templates = {heads.template for heads in self._sets if heads.template}
        if len(templates) > 1:
            raise InvalidInputError(
                "the head sets were found with different prompt templates; evaluate them apart"
            )
        self._readers: dict[Adapter | None, _Reader] = {}
        with ExitStack() as loaded:
            for adapter in dict.fromkeys(heads.adapter for heads in self._sets):
                own = [heads for heads in self._sets if heads.adapter == adapter]
                pairs = sorted({(head.layer, head.head) for heads in own for head in heads.heads})
                union = HeadSet.from_pairs(
                    pairs,
                    name=own[0].name,
                    model=model.model_id,
                    template=next(iter(templates), None),
                    adapter=adapter,
                )
                scorer = load_scorer(chosen_backend(settings, model, union), settings, model, union)
                loaded.callback(scorer.close)
                columns = {pair: column for column, pair in enumerate(pairs)}
                self._readers[adapter] = _Reader(scorer, columns)
            self._loaded = loaded.pop_all()

    def rank(
        self,
        collection: Collection,
        run: Run,
        queries: Sequence[str],
        progress: Progress = no_progress,
    ) -> dict[str, ScoredRun]:
        """Rank the candidates of each query by each method.

        Args:
            collection: Texts of queries and documents.
            run: The candidates, best first; a query that it lacks has none.
            queries: Query ids.
            progress: Wraps the prompts.

        Returns:
            Documents and scores by method and query, best first.
        """
        lists = [collection.candidates(query, run.get(query, ())) for query in queries]
        rankings: dict[str, ScoredRun] = {method.name: {} for method in self._methods}
        for query, by_method in zip(queries, self.scores(lists, progress), strict=True):
            for name, scores in by_method.items():
                order = best_indices(scores, len(scores))
                rankings[name][query] = [(run[query][i], float(scores[i])) for i in order]
        return rankings

    def scores(
        self, lists: Sequence[Candidates], progress: Progress = no_progress
    ) -> list[dict[str, Scores]]:
        """Score the documents of each list by each method.

        Args:
            lists: Queries and their candidates.
            progress: Wraps the prompts.

        Returns:
            For each list, the scores by method, shape [documents]. Those of the first stage are
            descending numbers.
        """
        scores = [
            {method.name: -np.arange(len(item.documents), dtype=float) for method in self._methods}
            for item in lists
        ]
        passes = dict.fromkeys((heads.adapter, heads.scoring.layout()) for heads in self._sets)
        for adapter, layout in passes:
            reader = self._readers[adapter]
            methods = [
                (method.name, method.heads, method.first_stage)
                for method in self._methods
                if method.heads is not None
                and (method.heads.adapter, method.heads.scoring.layout()) == (adapter, layout)
            ]
            planned = reader.scorer.plan(lists, layout)
            windows = [window for list_windows in planned for window in list_windows]
            weights = np.stack([reader.weights(heads) for _, heads, _ in methods])
            scored: list[list[WindowScores]] = [[] for _ in windows]
            for index, attention in progress(reader.scorer.stream(windows, weights), len(windows)):
                scored[index] = [
                    WindowScores(attention.select(row).scores(heads.scoring.drop_outliers))
                    for row, (_, heads, _) in enumerate(methods)
                ]
            remaining = iter(scored)
            for by_method, list_windows in zip(scores, planned, strict=True):
                own = list(islice(remaining, len(list_windows)))
                for row, (name, heads, first_stage) in enumerate(methods):
                    count = len(by_method[name])
                    merged = merge_windows(list_windows, [window[row] for window in own], count)
                    by_method[name] = merged.scores + heads.scoring.prior(count, first_stage)
        return scores

    def close(self) -> None:
        """Free the model."""
        self._loaded.close()
