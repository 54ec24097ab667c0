"""LangChain: a document compressor, a retriever and a search tool that rerank; an indexer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

from pydantic import Field

from core_rerank_integrations._internal.cancellation import run_in_thread
from core_rerank_integrations.errors import InvalidInputError, requires_extra
from core_rerank_integrations.integrations.fields import ModelFields, RerankerFields
from core_rerank_integrations.integrations.outputs import (
    METADATA_KEY,
    falling_scores,
    result_metadata,
)
from core_rerank_integrations.results import RerankResults

with requires_extra("langchain"):
    from langchain_core.callbacks import (
        AsyncCallbackManagerForRetrieverRun,
        CallbackManagerForRetrieverRun,
        Callbacks,
    )
    from langchain_core.documents import BaseDocumentCompressor, BaseDocumentTransformer, Document
    from langchain_core.prompts import BasePromptTemplate
    from langchain_core.retrievers import BaseRetriever, RetrieverLike
    from langchain_core.runnables import (
        RunnableConfig,
        RunnableLambda,
        RunnableSerializable,
        ensure_config,
        patch_config,
    )
    from langchain_core.runnables.utils import AnyConfigurableField
    from langchain_core.tools import BaseTool, create_retriever_tool

Output = TypeVar("Output")

# LangChain's base class hands the callbacks alone to the method that retrieves.
_config: ContextVar[RunnableConfig | None] = ContextVar("core_rerank_config", default=None)


class DocumentRanker(RerankerFields):
    """Base of the classes that rank documents."""

    def _run(
        self, name: str, output: Callable[[Sequence[Document], RerankResults], Output]
    ) -> RunnableLambda[dict[str, Any], Output]:
        """Return a rerank as a Runnable, which is a run of its own in traces.

        Args:
            name: Name of the run.
            output: Makes the output of the run from the documents and their results.
        """

        def rank(inputs: dict[str, Any]) -> Output:
            return output(inputs["documents"], self._rerank(**_arguments(inputs)))

        async def arank(inputs: dict[str, Any]) -> Output:
            return output(inputs["documents"], await self._arerank(**_arguments(inputs)))

        return RunnableLambda(rank, arank, name=name)

    def _copies(self, documents: Sequence[Document], results: RerankResults) -> list[Document]:
        copies = []
        for result, score in zip(results, falling_scores(results), strict=True):
            document = documents[result.index]
            ours = result_metadata(result, self.evidence)
            text = document.page_content
            if self.extract is not None and result.reranked:
                text, spans = result.extract(self.extract, self.extract_by)
                ours["extracted"] = [list(span) for span in spans]
            metadata = {**document.metadata, "relevance_score": score, METADATA_KEY: ours}
            update = {"page_content": text, "metadata": metadata}
            copies.append(document.model_copy(update=update))
        return copies


class CoReDocumentCompressor(DocumentRanker, BaseDocumentCompressor):
    """Rerank retrieved documents.

    Returns copies with all ids, types and metadata, sorted by ``metadata["relevance_score"]``. This
    is the `RerankResult.score`; documents that were not read in time have a score below those of
    the others. ``metadata["core_rerank"]`` holds the rest:

    - ``probability``: the probability that the document is relevant, from query and document
      alone; ``None`` if the heads are not calibrated or the document was not read.
    - ``reranked``: ``False`` if the document was not read within ``max_seconds``.
    - ``best_passage``: start and stop of the characters that the score comes from, if the
      document was read as several passages.
    - ``evidence``: start, stop and score of each sentence, best first, with ``evidence=True``.
    - ``extracted``: start and stop of the parts of the document that are kept, with ``extract``.
      All offsets are those of the whole document.

    The order of a first stage may add to the score. A call is a run in traces if callbacks are
    passed, as retrievers do.

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
        """Rank ``documents`` for ``query``; see `CoReReranker.rerank` for the errors."""
        inputs = {"query": query, "documents": documents}
        run = self._run(type(self).__name__, self._copies)
        return run.invoke(inputs, config={"callbacks": callbacks})

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Rank documents without blocking the event loop; see `compress_documents`."""
        inputs = {"query": query, "documents": documents}
        run = self._run(type(self).__name__, self._copies)
        return await run.ainvoke(inputs, config={"callbacks": callbacks})


class CoReRetriever(DocumentRanker, BaseRetriever):
    """Rerank what another retriever finds; for the results see `CoReDocumentCompressor`.

    ``invoke(query, k=3)`` returns three documents instead of ``top_n``. Other keyword arguments are
    passed to the inner retriever.

    Examples:
        >>> retriever = CoReRetriever(
        ...     retriever=store.as_retriever(search_kwargs={"k": 20}), first_stage="dense", top_n=5
        ... )
        >>> retriever.invoke("who invented the telephone?")
    """

    retriever: RetrieverLike = Field(
        description="Finds the candidates, more than are needed: a retriever, or anything that "
        "takes a query and returns documents."
    )

    def invoke(
        self,
        input: str,  # noqa: A002  The name in LangChain.
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """Find and rank documents for a query; see `CoReReranker.rerank` for the errors."""
        with _passed_on(config):
            return super().invoke(input, config, **kwargs)

    async def ainvoke(
        self,
        input: str,  # noqa: A002
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """Find and rank documents without blocking the event loop; see `invoke`."""
        with _passed_on(config):
            return await super().ainvoke(input, config, **kwargs)

    def configurable_fields(
        self, **kwargs: AnyConfigurableField
    ) -> RunnableSerializable[str, list[Document]]:
        """Make fields configurable in each call; the model is loaded now, and shared by all."""
        # LangChain makes a new object for each call, which would load a model of its own.
        shared = self.model_copy(update={"reranker": self._loaded_reranker()})
        return super(CoReRetriever, shared).configurable_fields(**kwargs)

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        k: int | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        config = patch_config(_config.get(), callbacks=run_manager.get_child())
        documents = self.retriever.invoke(query, config, **kwargs)
        inputs = {"query": query, "documents": documents, "top_n": self.top_n if k is None else k}
        return self._run("CoReReranker", self._copies).invoke(inputs, config)

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        k: int | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        config = patch_config(_config.get(), callbacks=run_manager.get_child())
        documents = await self.retriever.ainvoke(query, config, **kwargs)
        inputs = {"query": query, "documents": documents, "top_n": self.top_n if k is None else k}
        return await self._run("CoReReranker", self._copies).ainvoke(inputs, config)


def create_reranked_search_tool(
    retriever: RetrieverLike,
    name: str = "search",
    description: str = "Searches the knowledge base for passages that answer a question.",
    *,
    top_n: int = 5,
    document_prompt: BasePromptTemplate[str] | None = None,
    **settings: Any,
) -> BaseTool:
    """Create a search tool for agents that reranks what a retriever finds.

    Examples:
        >>> search = create_reranked_search_tool(store.as_retriever(search_kwargs={"k": 20}))
        >>> agent = create_agent(model, [search])

    Args:
        retriever: Finds the candidates; it should find more than ``top_n``.
        name: Name by which the model calls the tool.
        description: Description that tells the model when to call it.
        top_n: Maximum number of passages that the model reads.
        document_prompt: Template of a passage; ``None`` for its text alone.
        **settings: Fields of `CoReRetriever`, for example ``reranker`` or ``score_threshold``.

    Returns:
        A tool with one argument, ``query``. Its artifact is the list of documents.
    """
    return create_retriever_tool(
        CoReRetriever(retriever=retriever, top_n=top_n, **settings),
        name,
        description,
        document_prompt=document_prompt,
        response_format="content_and_artifact",
    )


class CoReDocumentIndexer(ModelFields, BaseDocumentTransformer):
    """Cache documents when a store is built, so that a rerank computes only the question.

    Returns the documents unchanged; see `CoReReranker.cache_documents` for what is stored and for
    the errors. The compressor needs the same model and heads: share one ``reranker``.

    Examples:
        >>> store.add_documents(CoReDocumentIndexer().transform_documents(chunks))
    """

    def transform_documents(
        self,
        documents: Sequence[Document],
        **kwargs: Any,  # noqa: ARG002  Part of the interface.
    ) -> Sequence[Document]:
        """Cache ``documents`` and return them."""
        self._loaded_reranker().cache_documents(_texts(documents))
        return documents

    async def atransform_documents(
        self, documents: Sequence[Document], **kwargs: Any
    ) -> Sequence[Document]:
        """Cache documents without blocking the event loop; see `transform_documents`."""
        return await run_in_thread(partial(self.transform_documents, documents, **kwargs))


@contextmanager
def _passed_on(config: RunnableConfig | None) -> Iterator[None]:
    token = _config.set(ensure_config(config))
    try:
        yield
    finally:
        _config.reset(token)


def _arguments(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the input of a run as arguments of a rerank."""
    arguments = {**inputs, "texts": _texts(inputs["documents"])}
    del arguments["documents"]
    return arguments


def _texts(documents: Sequence[Document]) -> list[str]:
    """Return the texts of documents.

    Raises:
        InvalidInputError: They are not a list of documents; a retriever may return anything.
    """
    items = documents if isinstance(documents, Sequence) else [documents]
    for item in items:
        if not isinstance(item, Document):
            raise InvalidInputError(f"documents must be a list of Documents, got {item!r:.200}")
    return [document.page_content for document in documents]
