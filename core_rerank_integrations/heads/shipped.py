"""The head sets inside this package."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from core_rerank_integrations._internal.files import expand_user
from core_rerank_integrations._internal.resources import resource_folder
from core_rerank_integrations.errors import HeadSetError
from core_rerank_integrations.heads.head_set import HeadSet

Heads = HeadSet | str | Path | Sequence[tuple[int, int]]
"""A head set, the name of a shipped one, a head set file, or (layer, head) pairs."""


@cache
def shipped_head_sets() -> dict[str, HeadSet]:
    """Return the head sets of this package by name."""
    sets = [HeadSet.load(path) for path in sorted(resource_folder("model_configs").glob("*.json"))]
    return {head_set.name: head_set for head_set in sets}


def head_set_for(heads: Heads | None, model: str | None, *, allows_adapter: bool = True) -> HeadSet:
    """Return the head set that a user's argument selects.

    Args:
        heads: The argument; ``None`` selects the default set of the model.
        model: Hub id of the model, or ``None`` if it is unknown.
        allows_adapter: Whether the default set may have an adapter.

    Raises:
        HeadSetError: There is no such head set, or the heads are invalid.
    """
    if heads is None:
        return default_head_set(model, allows_adapter=allows_adapter)
    if isinstance(heads, HeadSet):
        return heads
    if isinstance(heads, Path):
        return HeadSet.load(heads)
    if isinstance(heads, str):
        return named_head_set(heads)
    return HeadSet.from_pairs(heads, model=model)


def sets_of(model: str | None) -> list[HeadSet]:
    """Return the shipped head sets of a model, by hub id; none if the id is unknown."""
    return [
        head_set
        for head_set in shipped_head_sets().values()
        if model is not None and model in (head_set.model, *head_set.model_aliases)
    ]


def default_head_set(model: str | None, *, allows_adapter: bool = True) -> HeadSet:
    """Return a model's default head set, or its first by name if none is marked.

    Args:
        model: Hub id of the model, or ``None`` if it is unknown.
        allows_adapter: Whether it may have an adapter. A model may have two default sets, of which
            the one with an adapter comes first.

    Raises:
        HeadSetError: No head set is shipped for the model.
    """
    sets = sets_of(model)
    # If all have one, the backend says why it cannot take it.
    sets = [item for item in sets if allows_adapter or item.adapter is None] or sets
    if sets:
        return max(sets, key=lambda item: (item.default, item.default and item.adapter is not None))
    models = sorted({head_set.model or "" for head_set in shipped_head_sets().values()})
    raise HeadSetError(
        f"no head set is shipped for {model or 'a local model'}; pass heads=... (a HeadSet, the "
        f"path of a head set file, or a list of (layer, head)). Shipped: {', '.join(models)}"
    )


def named_head_set(name: str) -> HeadSet:
    """Return a head set by its shipped name, or from a file.

    Raises:
        HeadSetError: ``name`` is neither a shipped head set nor a file.
    """
    if name in shipped_head_sets():
        return shipped_head_sets()[name]
    with suppress(OSError):  # A name may be too long for a path.
        if expand_user(name).exists():
            return HeadSet.load(name)
    raise HeadSetError(
        f"{name!r} is neither a head set file nor a shipped head set; "
        f"shipped: {', '.join(shipped_head_sets())}"
    )
