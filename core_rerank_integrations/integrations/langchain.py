"""LangChain: a document compressor, a retriever and a search tool that rerank, an indexer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from core_rerank_integrations.errors import requires_extra
from core_rerank_integrations.integrations.fields import ModelFields, RerankerFields
from core_rerank_integrations.results import RerankResult

with requires_extra("langchain"):
    from langchain_core.callbacks import (
        AsyncCallbackManagerForRetrieverRun,
        CallbackManagerForRetrieverRun,
        Callbacks,
    )
    from langchain_core.documents import BaseDocumentCompressor, BaseDocumentTransformer, Document
    from langchain_core.prompts import BasePromptTemplate
    from langchain_core.retrievers import BaseRetriever
    from langchain_core.runnables import RunnableConfig, RunnableLambda
    from langchain_core.tools import BaseTool, create_retriever_tool


class _DocumentRanker(RerankerFields):
    """What ranks documents, in a run of its own."""

    def _run(self, name: str) -> RunnableLambda[dict[str, Any], list[Document]]:
        # A compressor is no Runnable: wrapped in one, it gets the run that traces show.
        return RunnableLambda(self._ranked, self._aranked, name=name)

    def _ranked(self, inputs: dict[str, Any]) -> list[Document]:
        return self._scored(inputs["documents"], self._rerank(**_request(inputs)))

    async def _aranked(self, inputs: dict[str, Any]) -> list[Document]:
        return self._scored(inputs["documents"], await self._arerank(**_request(inputs)))

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
            metadata |= self._evidence_of(result)
            changes: dict[str, Any] = {"metadata": metadata}
            if self.extract is not None and result.reranked:
                extract = result.extract(self.extract, self.extract_by)
                metadata["extracted"] = [list(span) for span in extract.spans]
                changes["page_content"] = extract.text
            copies.append(document.model_copy(update=changes))
        return copies


class CoReDocumentCompressor(_DocumentRanker, BaseDocumentCompressor):
    """Reorders retrieved documents by CoRe scores, and keeps the best.

    Returns copies, with ``metadata["relevance_score"]``: the probability that the document is
    relevant, or its score where the heads are not calibrated. Of a document that was too long to
    be read at once, ``metadata["best_passage"]`` holds the start and stop of the characters that
    it was ranked by. With ``extract=0.3`` documents come back cut to their strongest sentences, the
    characters that were kept in ``metadata["extracted"]``. Ids, types and all other metadata stay,
    and the documents passed in are not touched. Results are sorted by score, which a retriever's
    order may have a part in; the probability is of question and document alone. Every call shows up
    in traces as a run of its own when callbacks are handed over, as retrievers do.

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
        return self._run(type(self).__name__).invoke(
            {"query": query, "documents": documents}, config={"callbacks": callbacks}
        )

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """`compress_documents` without blocking the event loop."""
        return await self._run(type(self).__name__).ainvoke(
            {"query": query, "documents": documents}, config={"callbacks": callbacks}
        )


class CoReRetriever(_DocumentRanker, BaseRetriever):
    """A retriever that reranks what another one finds; for the rest see `CoReDocumentCompressor`.

    ``invoke(query, k=3)`` takes three documents whatever ``top_n`` says; other keyword arguments
    go to the retriever behind.

    Examples:
        >>> retriever = CoReRetriever(
        ...     retriever=store.as_retriever(search_kwargs={"k": 20}), ranked="vectors", top_n=5
        ... )
        >>> retriever.invoke("who invented the telephone?")
    """

    retriever: BaseRetriever = Field(description="Finds the candidates, more than are wanted.")

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        k: int | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        config: RunnableConfig = {"callbacks": run_manager.get_child()}
        documents = self.retriever.invoke(query, config, **kwargs)
        request = {"query": query, "documents": documents, "top_n": self.top_n if k is None else k}
        return self._run("CoReReranker").invoke(request, config)

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        k: int | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        config: RunnableConfig = {"callbacks": run_manager.get_child()}
        documents = await self.retriever.ainvoke(query, config, **kwargs)
        request = {"query": query, "documents": documents, "top_n": self.top_n if k is None else k}
        return await self._run("CoReReranker").ainvoke(request, config)


def create_reranked_search_tool(
    retriever: BaseRetriever,
    name: str = "search",
    description: str = "Searches the knowledge base for passages that answer a question.",
    *,
    top_n: int = 5,
    document_prompt: BasePromptTemplate[str] | None = None,
    **settings: Any,
) -> BaseTool:
    """A search tool for agents: what a retriever finds, reranked.

    Examples:
        >>> search = create_reranked_search_tool(store.as_retriever(search_kwargs={"k": 20}))
        >>> agent = create_agent(model, [search])

    Args:
        retriever: Finds the candidates, more than are wanted.
        name: By which the model calls the tool.
        description: From which the model knows when to.
        top_n: Passages that the model gets to read.
        document_prompt: How a passage is written; ``None`` for its text alone.
        **settings: Those of `CoReRetriever`; ``reranker``, say, or ``score_threshold``.

    Returns:
        A tool of one argument, ``query``; its artifact are the documents.
    """
    reranking = CoReRetriever(retriever=retriever, top_n=top_n, **settings)
    return create_retriever_tool(
        reranking,
        name,
        description,
        document_prompt=document_prompt,
        response_format="content_and_artifact",
    )


class CoReDocumentIndexer(ModelFields, BaseDocumentTransformer):
    """Reads documents when a store is built, so that reranking them costs the question alone.

    Documents pass through unchanged; see `CoReReranker.cache_documents` for what is kept and the errors.
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
        self._ready_reranker().cache_documents(_texts(documents))
        return documents

    async def atransform_documents(
        self, documents: Sequence[Document], **kwargs: Any
    ) -> Sequence[Document]:
        """`transform_documents` without blocking the event loop."""
        return await asyncio.to_thread(self.transform_documents, documents, **kwargs)


def _request(inputs: dict[str, Any]) -> dict[str, Any]:
    """What a run is given, as `RerankerFields` takes it."""
    others = {name: value for name, value in inputs.items() if name != "documents"}
    return {**others, "texts": _texts(inputs["documents"])}


def _texts(documents: Sequence[Document]) -> list[str]:
    return [document.page_content for document in documents]
