"""Folders at the top of the repository that the wheel also contains."""

from __future__ import annotations

from pathlib import Path


def resource_folder(name: str) -> Path:
    """Return ``model_configs`` or ``examples/data``, from the package or from the checkout."""
    package = Path(__file__).parents[1]
    installed = package / name
    return installed if installed.is_dir() else package.parent / name
