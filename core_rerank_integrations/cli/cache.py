"""``core-rerank cache``: read documents before a question is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from core_rerank_integrations.cli.common import command
from core_rerank_integrations.cli.documents import DocumentsFile, read_documents
from core_rerank_integrations.models.local_model import cache_folder
from core_rerank_integrations.reranker import CoReReranker
from core_rerank_integrations.settings import DocumentCache, RerankerSettings


@command
def cache(
    documents: DocumentsFile,
    settings: RerankerSettings,
    folder: Annotated[
        Path | None, typer.Option(help=DocumentCache.model_fields["folder"].description)
    ] = None,
) -> None:
    """Read the documents of a file and cache them on disk.

    A later rerank of these documents computes only the tokens of the query.
    """
    _, texts = read_documents(documents)
    document_cache = DocumentCache(folder=folder)
    with CoReReranker(**dict(settings) | {"document_cache": document_cache}) as reranker:
        written = reranker.cache_documents(texts, show_progress=True)
    target = document_cache.folder or cache_folder("documents")
    print(f"{len(texts)} documents are cached; {decimal(written)} written to {target}")
