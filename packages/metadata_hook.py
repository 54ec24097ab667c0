"""Dependency of both thin packages: the main package, at their own version or later."""

from __future__ import annotations

from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class MainPackageHook(MetadataHookInterface):
    """Fill in ``dependencies``, so that the version is written in one place."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Require the main package with the ``extras`` of this package."""
        extras = ",".join(self.config["extras"])
        metadata["dependencies"] = [f"core-rerank-integrations[{extras}]>={metadata['version']}"]
