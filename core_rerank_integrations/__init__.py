"""Rerank retrieved documents by a language model's contrastive retrieval heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core_rerank_integrations.exports import lazy_exports

if TYPE_CHECKING:
    from core_rerank_integrations.heads import Head, HeadSet
    from core_rerank_integrations.langchain import (
        CoReDocumentCompressor,
        CoReDocumentIndexer,
        CoReRetriever,
        create_reranked_search_tool,
    )
    from core_rerank_integrations.llama_index import CoReNodeIndexer, CoReNodePostprocessor
    from core_rerank_integrations.prompt import PromptTemplate
    from core_rerank_integrations.reranker import CoReReranker
    from core_rerank_integrations.results import RerankResult
    from core_rerank_integrations.store import DocumentCache

__version__ = "0.1.0"

__all__ = [
    "CoReDocumentCompressor",
    "CoReDocumentIndexer",
    "CoReNodeIndexer",
    "CoReNodePostprocessor",
    "CoReReranker",
    "CoReRetriever",
    "DocumentCache",
    "Head",
    "HeadSet",
    "PromptTemplate",
    "RerankResult",
    "create_reranked_search_tool",
]

_MODULES = {
    "CoReDocumentCompressor": "langchain",
    "CoReDocumentIndexer": "langchain",
    "CoReNodeIndexer": "llama_index",
    "CoReNodePostprocessor": "llama_index",
    "CoReReranker": "reranker",
    "CoReRetriever": "langchain",
    "DocumentCache": "store",
    "Head": "heads",
    "HeadSet": "heads",
    "PromptTemplate": "prompt",
    "RerankResult": "results",
    "create_reranked_search_tool": "langchain",
}

__getattr__, __dir__ = lazy_exports(__name__, _MODULES)
