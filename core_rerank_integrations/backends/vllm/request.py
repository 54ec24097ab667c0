"""What travels with a request and with a model's configuration: plain data, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEADS_KEY = "core_rerank_heads"
"""In the model's configuration: list of [layer, head, weight]."""

QUERY_START_KEY = "core_rerank_query_start"
"""In a request's ``extra_kwargs``: index of the first token of the query span."""


def query_start(pooling_params: Any) -> int | None:
    """Where a request's query span starts, or ``None`` if the request is not ours."""
    extra: Mapping[str, Any] | None = getattr(pooling_params, "extra_kwargs", None)
    return extra.get(QUERY_START_KEY) if extra else None
