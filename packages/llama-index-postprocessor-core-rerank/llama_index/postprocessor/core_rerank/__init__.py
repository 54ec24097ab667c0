"""The LlamaIndex classes of core-rerank-integrations, in LlamaIndex's namespace."""

from core_rerank_integrations import CoReNodeIndexer, CoReNodePostprocessor

__all__ = ["CoReNodeIndexer", "CoReNodePostprocessor"]
