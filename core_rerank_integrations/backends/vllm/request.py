"""What travels with a request and with a model's configuration: plain data, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEADS_KEY = "core_rerank_heads"
"""In the model's configuration: list of [layer, head, weight]."""

FIRST_ROW_KEY = "core_rerank_first_row"
"""With a request: index of the first token that is asked what it attends to; the last one is that
of the request."""

COLUMNS_KEY = "core_rerank_columns"
"""With a request: how many of its tokens, from the first on, the attention on them is told of."""

UNSHARED_KEY = "core_rerank_unshared"
"""With a request: index of the first token whose block of the cache is for this request alone."""

PER_HEAD_KEY = "core_rerank_per_head"
"""With a request: whether its heads are reported each by itself, unweighted."""

SELF_TEST_KEY = "core_rerank_self_test"
"""With a request: whether it asks how far the probes are from the engine's own attention."""

RESULT_KEY = "core_rerank_result"
"""With a request of a generating engine: under which name its attention is fetched."""

TRAILING_TOKENS = 1
"""After the prompt of a generating engine, and no part of it.

A last chunk of a single token may run in a graph that no probe sees into; a token that nobody
asks about takes that place, and what comes before it is the same with it and without.
"""


def rerank_options(parameters: Any) -> Mapping[str, Any] | None:
    """What this package sent along with a request; ``None`` if the request is not ours.

    Args:
        parameters: Its ``PoolingParams`` or ``SamplingParams``; ``None`` is no request of ours.
    """
    for name in ("extra_kwargs", "extra_args"):
        options: Mapping[str, Any] | None = getattr(parameters, name, None)
        if options and FIRST_ROW_KEY in options:
            return options
    return None
