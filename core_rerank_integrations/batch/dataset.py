"""Rerank a table of lists on Ray Data."""

from __future__ import annotations

import gc
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from core_rerank_integrations.batch.lists import ListReranker, Row
from core_rerank_integrations.batch.options import PoolOptions
from core_rerank_integrations.errors import BackendError, InvalidInputError, requires_extra
from core_rerank_integrations.method.prompt import encodable
from core_rerank_integrations.settings import RerankerSettings, RerankOptions

with requires_extra("ray"):
    import pyarrow as pa
    import ray
    from ray.data import ActorPoolStrategy
    from ray.exceptions import RayError

if TYPE_CHECKING:
    from ray.data import Dataset

RESULTS = pa.list_(
    pa.struct(
        {
            "index": pa.int64(),
            "score": pa.float64(),
            "probability": pa.float64(),
            "reranked": pa.bool_(),
            "best_passage": pa.list_(pa.int64()),
            "evidence": pa.list_(
                pa.struct({"start": pa.int64(), "stop": pa.int64(), "score": pa.float64()})
            ),
        }
    )
)
"""Type of the results of a list, best first. ``index`` is that of the document in its list."""

OWN_ERROR = re.compile(r"^core_rerank_integrations\.errors\.\w+: (.*)$", re.MULTILINE)


class _TableReranker:
    """Rerank tables in an actor of Ray."""

    def __init__(self, settings: RerankerSettings, options: RerankOptions) -> None:
        self._rerank = ListReranker(settings, options)

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        self._rerank.check(rows)
        rows = self._rerank(rows)
        for name, kind in (("results", RESULTS), ("answerability", pa.float64())):
            table = table.append_column(name, pa.array([row[name] for row in rows], kind))
        return table


def rerank_dataset(
    dataset: Dataset,
    settings: RerankerSettings | None = None,
    options: RerankOptions | None = None,
    pool: PoolOptions | None = None,
) -> Dataset:
    """Rerank each row of a Ray dataset, lazily.

    If a process dies, Ray starts another one and repeats its batches.

    Args:
        dataset: Rows with ``query``, ``documents`` (a list of texts) and, optionally,
            ``first_stage_scores`` and ``id``, which errors name. Other columns stay as they are.
        settings: The model and its heads; ``None`` for the defaults.
        options: Options of each list; ``None`` for the defaults.
        pool: Number of models, their processors, and lists that are read together; ``None`` for
            the defaults, one model.

    Returns:
        The dataset with two more columns: ``results``, of the type `RESULTS`, and
        ``answerability``.

    Raises:
        InvalidInputError: A column is missing.
    """
    pool = pool or PoolOptions()
    columns = dataset.columns()
    if missing := {"query", "documents"}.difference(columns or ()):
        raise InvalidInputError(
            f"the dataset has no column {', '.join(sorted(missing))}, but {columns}: rename its "
            "columns"
        )
    return dataset.map_batches(
        _TableReranker,
        fn_constructor_args=(settings or RerankerSettings(), options or RerankOptions()),
        batch_size=pool.lists_per_batch,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=pool.replicas or 1),
        **pool.actor_options(),
    )


def rerank_batches(
    batches: Sequence[Sequence[Row]],
    settings: RerankerSettings,
    options: RerankOptions,
    pool: PoolOptions,
) -> Iterator[list[Row]]:
    """Rerank batches of lists on Ray, and start it if the program has not.

    Args:
        batches: Rows of each batch.
        settings: The model and its heads.
        options: Options of each list.
        pool: Number of models, and their processors.

    Yields:
        Rows with their ``key``, their ``results`` and their ``answerability``, in any order.

    Raises:
        BackendError: The model cannot be loaded, or a list cannot be reranked.
    """
    with _cluster():
        tables = [pa.Table.from_pylist([_encodable(row) for row in batch]) for batch in batches]
        dataset = rerank_dataset(ray.data.from_arrow(tables), settings, options, pool)
        dataset.context.enable_progress_bars = False
        failure = None
        try:
            for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
                yield table.select(["key", "results", "answerability"]).to_pylist()
        except RayError as error:
            failure = _reason(error)
        if failure is not None:
            # Ray ends the processes of a failed dataset only when nothing refers to them. Its error
            # does, in a cycle. Until then they keep their processors, and the next run waits.
            gc.collect()
            raise BackendError(failure)


def _encodable(row: Row) -> Row:
    """Return a row without surrogates, which Arrow cannot hold; prompts have none either."""
    documents = [encodable(document) for document in row["documents"]]
    return row | {"query": encodable(row["query"]), "documents": documents}


def _reason(error: RayError) -> str:
    """Return this package's own error, of which Ray hands over no more than a traceback as text."""
    own = OWN_ERROR.findall(str(error))
    return own[-1] if own else f"a process of Ray has failed: {error}"


@contextmanager
def _cluster() -> Iterator[None]:
    """Use the cluster of the program, or that of ``RAY_ADDRESS``, or start one here."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(logging_level=logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()
