"""What travels between caller and engine: plain data."""

from __future__ import annotations

from typing import Any, NamedTuple

HEADS_KEY = "core_rerank_heads"
"""In the model's configuration: the heads of the head set, as JSON."""
OPTIONS_KEY = "core_rerank"
"""In the extra arguments of a request: its `RequestOptions` as a list."""
TRAILING_TOKENS = 1
"""Number of tokens that follow the prompt of a generating engine and are not part of it.

A last chunk of a single token may run in a captured graph, which calls no probe. The trailing token
takes the place of that chunk. It does not change the attention of the tokens before it.
"""


class RequestOptions(NamedTuple):
    """What a request asks for.

    Attributes:
        first_row: Index of the first query row. The last query row is the last token.
        columns: Number of tokens, from the first on, whose attention mass is returned.
        unshared: Index of the first token whose cache block no other request may use.
        per_head: Whether the mass of each head is returned, without weights.
        is_self_test: Whether the probes are compared with the engine's own attention.
        result: For a generating engine, the name by which the result is fetched.
    """

    first_row: int
    columns: int
    unshared: int
    per_head: bool = False
    is_self_test: bool = False
    result: str = ""

    @classmethod
    def of(cls, parameters: Any) -> RequestOptions | None:
        """Return the options of a request; ``None`` if this package did not send it.

        Args:
            parameters: The request's ``PoolingParams`` or ``SamplingParams``, or ``None``.
        """
        for name in ("extra_kwargs", "extra_args"):
            extra = getattr(parameters, name, None)
            if extra and OPTIONS_KEY in extra:
                return cls(*extra[OPTIONS_KEY])
        return None
