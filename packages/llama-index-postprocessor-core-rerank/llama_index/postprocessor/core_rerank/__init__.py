"""The LlamaIndex side of core-rerank-integrations, where LlamaIndex's users look for it."""

from core_rerank_integrations import CoReNodeIndexer, CoReNodePostprocessor

__all__ = ["CoReNodeIndexer", "CoReNodePostprocessor"]
