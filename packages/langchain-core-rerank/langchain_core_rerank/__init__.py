"""The LangChain side of core-rerank-integrations, where LangChain's users look for it."""

from core_rerank_integrations import CoReDocumentCompressor, CoReDocumentIndexer

__all__ = ["CoReDocumentCompressor", "CoReDocumentIndexer"]
