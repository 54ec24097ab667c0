"""Folders that stand at the top of the repository and travel inside the wheel."""

from __future__ import annotations

from pathlib import Path


def resource_folder(name: str) -> Path:
    """``model_configs`` or ``examples/data``: in the installed package, else in the checkout."""
    package = Path(__file__).parent
    installed = package / name
    return installed if installed.is_dir() else package.parent / name
