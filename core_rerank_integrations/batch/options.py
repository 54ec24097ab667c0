"""Options of the functions that rerank collections; the command line offers the same."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from core_rerank_integrations.heads.scoring_config import Count
from core_rerank_integrations.settings import ReplicaResources


class PoolOptions(ReplicaResources):
    """Where lists are reranked."""

    replicas: Count | None = Field(
        default=None,
        description="Number of models that run on Ray; by default one runs in this process.",
    )
    lists_per_batch: Count = Field(
        default=8,
        description="Number of lists that are read together, and repeated if a process dies.",
    )


class RunOptions(PoolOptions):
    """A run and its collection."""

    run: Path = Field(description="TREC run of the first stage: the candidates.")
    corpus: Path = Field(
        description="Documents: a JSONL file with '_id', 'text' and, optionally, 'title', or a "
        "folder in the layout of BEIR.",
    )
    queries: Path | None = Field(
        default=None,
        description="Queries: a JSONL file with '_id' and 'text'; by default that of the folder.",
    )
    output: Path = Field(
        description="TREC run to write. Finished queries are kept beside it meanwhile, and an "
        "interrupted run continues from them."
    )
    candidates: Count | None = Field(
        default=None, description="Number of candidates per query, from the first; by default all."
    )
