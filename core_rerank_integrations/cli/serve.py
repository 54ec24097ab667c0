"""``core-rerank serve``: a rerank server for clients of Cohere, Jina, vLLM and TEI."""

from __future__ import annotations

import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from core_rerank_integrations._internal.memory import return_large_blocks
from core_rerank_integrations._internal.web import LOCAL_NAMES, listen, url_of
from core_rerank_integrations.cli.common import command
from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.serving.limits import Limits
from core_rerank_integrations.settings import DocumentCache, RerankerSettings


@command
def serve(
    settings: RerankerSettings,
    limits: Limits,
    document_cache: DocumentCache,
    host: Annotated[
        str, typer.Option(help="Address to listen on; by default only this machine has access.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port.")] = 8080,
    api_key_env: Annotated[
        str | None,
        typer.Option(help="Environment variable with the key that requests have to carry."),
    ] = None,
    vllm_args: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="-- VLLM_ARGUMENTS",
            help="Arguments of vLLM's engine; with vllm-shared, all of 'vllm serve'.",
        ),
    ] = None,
) -> None:
    """Start a rerank server for clients of Cohere, Jina, vLLM and Text Embeddings Inference.

    With --backend vllm-shared this is 'vllm serve', which then answers and reranks.
    """
    from core_rerank_integrations.reranker import CoReReranker
    from core_rerank_integrations.serving.app import create_app
    from core_rerank_integrations.serving.guard import key_from
    from core_rerank_integrations.serving.server import serve as run

    if document_cache != DocumentCache():
        settings = settings.checked(**dict(settings) | {"document_cache": document_cache})
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    key = key_from(api_key_env)
    if host not in LOCAL_NAMES and key is None:
        console.print(f"Everyone who can reach {host} can use it: no --api-key-env is given.")
    if settings.backend == "vllm-shared":
        _become_vllm(settings, limits, host, port, key, vllm_args or [], console)
    if vllm_args:
        settings = _with_engine_args(settings, vllm_args)
    with listen(host, [port]) as listener:
        console.print(f"Listening on {url_of(listener)}; loading {settings.model} ...")
        return_large_blocks()
        app = create_app(partial(CoReReranker, **dict(settings)), limits, key)
        run(app, listener, limits)


def _become_vllm(
    settings: RerankerSettings,
    limits: Limits,
    host: str,
    port: int,
    key: str | None,
    vllm_args: list[str],
    console: Console,
) -> NoReturn:
    """Print the command that starts ``vllm serve``, and run it in place of this program."""
    from core_rerank_integrations.serving.vllm import vllm_command, vllm_variables

    with listen(host, [port]):
        pass  # vLLM says only after the model is loaded that the port is in use.
    command = vllm_command(settings, limits, host, port, vllm_args)
    variables = vllm_variables(os.environ)
    shown = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    if key is not None:
        variables["VLLM_API_KEY"] = key
        shown.append("VLLM_API_KEY=...")
    console.print(f"Starting: {' '.join(shown)} {shlex.join(command)}")
    program = Path(sys.executable).with_name(command[0])
    os.execve(program, command, os.environ | variables)  # noqa: S606  No shell reads them.


def _with_engine_args(settings: RerankerSettings, vllm_args: list[str]) -> RerankerSettings:
    """Return settings with arguments of vLLM's engine.

    Raises:
        InvalidInputError: The backend is not vLLM, or an argument is not of the engine.
    """
    if settings.backend != "vllm":
        raise InvalidInputError(
            f"{shlex.join(vllm_args)}: arguments after -- are for the vLLM backends, not for "
            f"{settings.backend!r}"
        )
    from core_rerank_integrations.backends.vllm.caller.arguments import parsed_arguments

    engine_args, others = parsed_arguments(vllm_args)
    if others:
        raise InvalidInputError(
            f"{shlex.join(others)}: no argument of vLLM's engine. Those of 'vllm serve' are for "
            "--backend vllm-shared"
        )
    return settings.model_copy(update={"engine_args": engine_args})
