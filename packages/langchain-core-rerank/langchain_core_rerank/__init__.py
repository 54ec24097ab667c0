"""The LangChain classes of core-rerank-integrations, under a name that LangChain users expect."""

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
