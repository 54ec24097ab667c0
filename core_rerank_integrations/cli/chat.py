"""``core-rerank chat``: a chatbot in the browser that shows what its answers rest on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from core_rerank_integrations.cli.common import (
    BackendOption,
    DtypeOption,
    HeadsOption,
    ModelOption,
    clear_errors,
)
from core_rerank_integrations.models.resolve import DEFAULT_MODEL

if TYPE_CHECKING:
    from core_rerank_integrations.chat.knowledge import Progress

LOCAL = ("127.0.0.1", "localhost", "::1")


def chat(
    data: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps the documents; default in your data folder."),
    ] = None,
    files: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True, dir_okay=False, help="A document to add; may be given several times."
        ),
    ] = None,
    llm_url: Annotated[
        str | None,
        typer.Option(
            help="OpenAI-compatible endpoint that answers; its key comes from OPENAI_API_KEY."
        ),
    ] = None,
    llm: Annotated[str | None, typer.Option(help="The model's name at that endpoint.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; by default this machine alone gets in.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the first free from 7860 on.")
    ] = None,
    open_browser: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page in a browser.")
    ] = True,
    model: ModelOption = DEFAULT_MODEL,
    heads: HeadsOption = None,
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """A chatbot in the browser, over a handbook or documents of your own."""
    with clear_errors():
        from core_rerank_integrations.chat.app import build_app, launch, warm_up
        from core_rerank_integrations.chat.generators import generators
        from core_rerank_integrations.chat.knowledge import KnowledgeBase
        from core_rerank_integrations.reranker import CoReReranker

        ways = generators(llm_url, llm)
        console = Console(stderr=True)
        if host not in LOCAL:
            console.print(
                f"Whoever reaches {host} can read the documents, and add and remove some."
            )
        with CoReReranker(model, heads=heads, backend=backend, dtype=dtype, window=1) as reranker:
            knowledge = KnowledgeBase(data, reranker)
            if knowledge.is_new and not files:
                _show(console, knowledge.add_handbook())
            for path in files or []:
                _show(console, knowledge.add_file(path))
            warm_up(knowledge, reranker)
            launch(build_app(knowledge, reranker, ways), host, port, open_browser)


def _show(console: Console, reading: Iterator[Progress]) -> None:
    with console.status("Reading ...") as status:
        for progress in reading:
            status.update(
                f"Reading {progress.source}: {progress.done} of {progress.total} passages"
            )
