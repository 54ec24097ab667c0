"""``core-rerank remember``: documents read before anything is asked about them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal

from core_rerank_integrations.backends.local.store import DocumentCache
from core_rerank_integrations.cli.common import (
    BackendOption,
    DtypeOption,
    HeadsOption,
    ModelOption,
    clear_errors,
)
from core_rerank_integrations.cli.documents import DocumentsFile, read_documents
from core_rerank_integrations.models.resolve import DEFAULT_MODEL, cache_folder


def cache_documents(
    documents: DocumentsFile,
    model: ModelOption = DEFAULT_MODEL,
    heads: HeadsOption = None,
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
    window: Annotated[
        int | None, typer.Option(min=1, max=1, help="1, for heads that want larger prompts.")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(help="Where they are kept; default in the package's cache."),
    ] = None,
) -> None:
    """Read the documents of a file, and keep what reranking them needs on disk."""
    from core_rerank_integrations.reranker import CoReReranker

    with clear_errors():
        _, texts = read_documents(documents)
        cache = DocumentCache(folder=folder)
        with CoReReranker(
            model,
            heads=heads,
            backend=backend,
            dtype=dtype,
            window=window,
            document_cache=cache,
        ) as reranker:
            written = reranker.cache_documents(texts, show_progress=True)
    Console().print(
        f"{len(texts)} documents are known; {decimal(written)} written to "
        f"{folder or cache_folder('documents')}",
        soft_wrap=True,
    )
