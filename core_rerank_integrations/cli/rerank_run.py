"""``core-rerank rerank-run``: rerank a run over a collection."""

from __future__ import annotations

from core_rerank_integrations import batch
from core_rerank_integrations.batch.options import RunOptions
from core_rerank_integrations.cli.common import command
from core_rerank_integrations.settings import RerankerSettings, RerankOptions


@command
def rerank_run(run: RunOptions, options: RerankOptions, settings: RerankerSettings) -> None:
    """Rerank a TREC run over a collection, in this process or on Ray.

    An interrupted run continues where it stopped, with the same command.
    """
    batch.rerank_run(run, settings, options, show_progress=True)
    print(f"Wrote {run.output}")
