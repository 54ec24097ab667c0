"""``core-rerank serve``: a rerank server for clients of Cohere, Jina, vLLM and TEI."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer
from rich.console import Console

from core_rerank_integrations._internal.web import LOCAL_NAMES, listen, url_of
from core_rerank_integrations.cli.common import command
from core_rerank_integrations.serving.limits import Limits
from core_rerank_integrations.settings import RerankerSettings


@command
def serve(
    settings: RerankerSettings,
    limits: Limits,
    host: Annotated[
        str, typer.Option(help="Address to listen on; by default only this machine has access.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port.")] = 8080,
    api_key_env: Annotated[
        str | None,
        typer.Option(help="Environment variable with the key that requests have to carry."),
    ] = None,
) -> None:
    """Start a rerank server for clients of Cohere, Jina, vLLM and Text Embeddings Inference."""
    from core_rerank_integrations.reranker import CoReReranker
    from core_rerank_integrations.serving.app import create_app
    from core_rerank_integrations.serving.guard import key_from
    from core_rerank_integrations.serving.server import serve as run

    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    key = key_from(api_key_env)
    with listen(host, [port]) as listener:
        if host not in LOCAL_NAMES and key is None:
            console.print(f"Everyone who can reach {host} can use it: no --api-key-env is given.")
        console.print(f"Listening on {url_of(listener)}; loading {settings.model} ...")
        app = create_app(partial(CoReReranker, **dict(settings)), limits, key)
        run(app, listener, limits)
