"""LangChain: a document compressor, and a transformer that reads documents ahead."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from core_rerank_integrations.adapter import ModelFields, RerankerFields
from core_rerank_integrations.errors import requires_extra
from core_rerank_integrations.results import RerankResult

with requires_extra("langchain"):
    from langchain_core.callbacks import Callbacks
    from langchain_core.documents import BaseDocumentCompressor, BaseDocumentTransformer, Document
    from langchain_core.runnables import RunnableLambda


class CoReDocumentCompressor(RerankerFields, BaseDocumentCompressor):
    """Reorders retrieved documents by CoRe scores, and keeps the best.

    Returns copies, with ``metadata["relevance_score"]``: the probability that the document is
    relevant, or its score where the heads are not calibrated. Of a document that was too long to
    be read at once, ``metadata["best_passage"]`` holds the start and stop of the characters that
    it was ranked by. Ids, types and all other metadata stay, and the documents passed in are not
    touched. Results are sorted by score, which a retriever's order may have a part in; the
    probability is of question and document alone. Every call shows up in traces
    as a run of its own when callbacks are handed over, as retrievers do.

    Examples:
        >>> from langchain_classic.retrievers import ContextualCompressionRetriever
        >>> retriever = ContextualCompressionRetriever(
        ...     base_compressor=CoReDocumentCompressor(top_n=5),
        ...     base_retriever=vector_store_retriever,
        ... )
    """

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Rank ``documents`` by ``query``; see `CoReReranker.rerank` for the errors."""
        return self._run().invoke(
            {"query": query, "documents": documents}, config={"callbacks": callbacks}
        )

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """`compress_documents` without blocking the event loop."""
        return await self._run().ainvoke(
            {"query": query, "documents": documents}, config={"callbacks": callbacks}
        )

    def _run(self) -> RunnableLambda[dict[str, Any], list[Document]]:
        # A compressor is no Runnable: wrapped in one, it gets the run that traces show.
        return RunnableLambda(self._compress, self._acompress, name=type(self).__name__)

    def _compress(self, inputs: dict[str, Any]) -> list[Document]:
        documents: Sequence[Document] = inputs["documents"]
        return self._scored(documents, self._rerank(inputs["query"], _texts(documents)))

    async def _acompress(self, inputs: dict[str, Any]) -> list[Document]:
        documents: Sequence[Document] = inputs["documents"]
        return self._scored(documents, await self._arerank(inputs["query"], _texts(documents)))

    def _scored(
        self, documents: Sequence[Document], results: Sequence[RerankResult]
    ) -> list[Document]:
        copies = []
        for result in results:
            document = documents[result.index]
            metadata = dict(document.metadata)
            if result.reranked:
                metadata["relevance_score"] = self._score_of(result)
            else:
                metadata |= {"relevance_score": None, "reranked": False}
            if result.passage is not None:
                metadata["best_passage"] = list(result.passage)
            copies.append(document.model_copy(update={"metadata": metadata}))
        return copies


class CoReDocumentIndexer(ModelFields, BaseDocumentTransformer):
    """Reads documents when a store is built, so that reranking them costs the question alone.

    Documents pass through unchanged; see `CoReReranker.remember` for what is kept and the errors.
    The compressor must have the same model and heads, best by sharing one ``reranker``.

    Examples:
        >>> store.add_documents(CoReDocumentIndexer().transform_documents(chunks))
    """

    def transform_documents(
        self,
        documents: Sequence[Document],
        **kwargs: Any,  # noqa: ARG002  Part of the interface.
    ) -> Sequence[Document]:
        """Read ``documents``, and hand them on."""
        self._ready_reranker().remember(_texts(documents))
        return documents

    async def atransform_documents(
        self, documents: Sequence[Document], **kwargs: Any
    ) -> Sequence[Document]:
        """`transform_documents` without blocking the event loop."""
        return await asyncio.to_thread(self.transform_documents, documents, **kwargs)


def _texts(documents: Sequence[Document]) -> list[str]:
    return [document.page_content for document in documents]
