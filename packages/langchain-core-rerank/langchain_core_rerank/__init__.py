"""The LangChain side of core-rerank-integrations, where LangChain's users look for it."""

from core_rerank_integrations import (
    CoReDocumentCompressor,
    CoReDocumentIndexer,
    CoReRetriever,
    create_reranked_search_tool,
)

__all__ = [
    "CoReDocumentCompressor",
    "CoReDocumentIndexer",
    "CoReRetriever",
    "create_reranked_search_tool",
]
