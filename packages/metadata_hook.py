"""What both thin packages need: the main one, of their own version or later."""

from __future__ import annotations

from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class MainPackageHook(MetadataHookInterface):
    """Fills in ``dependencies``, so that the version stands in one place only."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Require the main package with this package's ``extras``."""
        extras = ",".join(self.config["extras"])
        metadata["dependencies"] = [f"core-rerank-integrations[{extras}]>={metadata['version']}"]
