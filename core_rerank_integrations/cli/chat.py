"""``core-rerank chat``: a chatbot in the browser that shows the evidence for its answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from core_rerank_integrations._internal.web import LOCAL_NAMES
from core_rerank_integrations.cli.common import command
from core_rerank_integrations.settings import RerankerSettings

if TYPE_CHECKING:
    from core_rerank_integrations.chat.knowledge import Progress


@command
def chat(
    settings: RerankerSettings,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of the documents; by default in your data folder."),
    ] = None,
    files: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True, dir_okay=False, help="A document to add; can be given several times."
        ),
    ] = None,
    llm_url: Annotated[
        str | None,
        typer.Option(
            help="OpenAI-compatible endpoint that answers; its key is read from OPENAI_API_KEY."
        ),
    ] = None,
    llm: Annotated[str | None, typer.Option(help="Name of the model at that endpoint.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; by default only this machine has access.")
    ] = "127.0.0.1",
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Another name of this machine, or of a proxy, under which browsers open the page; "
            "can be given several times."
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port; by default the first free one from 7860."),
    ] = None,
    open_browser: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page in a browser.")
    ] = True,
) -> None:
    """Start a chatbot in the browser, over a handbook or your own documents."""
    from core_rerank_integrations.chat.server import listen, serve

    console = Console(stderr=True, markup=False)
    with listen(host, port) as listener:  # Before anything is loaded, which takes a while.
        from core_rerank_integrations.chat.app import build_app, warm_up
        from core_rerank_integrations.chat.generators import generators
        from core_rerank_integrations.chat.knowledge import KnowledgeBase, data_folder, lock_folder
        from core_rerank_integrations.reranker import CoReReranker

        choices = generators(llm_url, llm)
        folder = data_folder(data)
        if host not in LOCAL_NAMES:
            console.print(f"Everyone who can reach {host} can read, add and remove the documents.")
        # Documents are cached, which needs prompts with one document each.
        own = {"documents_per_prompt": settings.documents_per_prompt or 1}
        with (
            lock_folder(folder),
            CoReReranker(**dict(settings) | own) as reranker,
            closing(KnowledgeBase(folder, reranker)) as knowledge,
        ):
            if knowledge.is_new and not files:
                _show(console, knowledge.add_handbook())
            for path in files or []:
                _show(console, knowledge.add_file(path))
            warm_up(knowledge, reranker)
            app = build_app(knowledge, reranker, choices, host, allowed_host or ())
            serve(app, listener, open_browser)


def _show(console: Console, reading: Iterator[Progress]) -> None:
    with console.status("Reading ...") as status:
        for progress in reading:
            # Text shows brackets in names of files as they are, where a string would be markup.
            status.update(Text(str(progress)))
