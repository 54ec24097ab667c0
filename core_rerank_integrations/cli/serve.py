"""``core-rerank serve``: a rerank server for clients of Cohere, Jina, vLLM, Voyage and TEI."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterable
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

SECRETS = ("--api-key", "--hf-token")
"""Arguments of vLLM whose values are not shown."""


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
    """Start a rerank server for clients of Cohere, Jina, vLLM, Voyage and TEI.

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
    is_shared = settings.backend == "vllm-shared"
    has_key = key is not None or (is_shared and _has_vllm_key(vllm_args or []))
    if host not in LOCAL_NAMES and not has_key:
        console.print(f"Everyone who can reach {host} can use it: no --api-key-env is given.")
    if is_shared:
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
    """Print the command that starts ``vllm serve``, and run it in place of this program.

    Raises:
        InvalidInputError: There are two keys, or vLLM's program is not found.
    """
    from core_rerank_integrations.serving.vllm import vllm_command, vllm_variables

    if key is not None and _has_option(vllm_args, "--api-key"):
        raise InvalidInputError("--api-key and --api-key-env are two keys: give one of them")

    with listen(host, [port]):
        pass  # vLLM says only after the model is loaded that the port is in use.
    command = vllm_command(settings, limits, host, port, vllm_args)
    variables = vllm_variables(os.environ)
    shown = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    if key is not None:
        variables["VLLM_API_KEY"] = key
        shown.append("VLLM_API_KEY=...")
    console.print(f"Starting: {' '.join(shown)} {_shown(command)}")
    folders = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    program = shutil.which(command[0], path=folders)
    if program is None:
        raise InvalidInputError("there is no program 'vllm' beside Python or in PATH: install vllm")
    os.execve(program, command, os.environ | variables)  # noqa: S606  No shell reads them.


def _with_engine_args(settings: RerankerSettings, vllm_args: list[str]) -> RerankerSettings:
    """Return settings with arguments of vLLM's engine.

    Raises:
        InvalidInputError: The backend is not vLLM, or an argument is not of the engine.
    """
    if settings.backend != "vllm":
        raise InvalidInputError(
            f"{_shown(vllm_args)}: arguments after -- are for the vLLM backends, not for "
            f"{settings.backend!r}"
        )
    from core_rerank_integrations.backends.vllm.caller.arguments import parsed_arguments

    engine_args, others = parsed_arguments(vllm_args)
    if others:
        raise InvalidInputError(
            f"{_shown(others)}: no argument of vLLM's engine. Those of 'vllm serve' are for "
            "--backend vllm-shared"
        )
    return settings.model_copy(update={"engine_args": engine_args})


def _has_vllm_key(vllm_args: Iterable[str]) -> bool:
    """Return whether ``vllm serve`` has a key of its own."""
    return bool(os.environ.get("VLLM_API_KEY")) or _has_option(vllm_args, "--api-key")


def _has_option(arguments: Iterable[str], option: str) -> bool:
    return any(_is_option(argument, option) for argument in arguments)


def _shown(arguments: Iterable[str]) -> str:
    """Return a command line of vLLM that shows ``...`` in place of keys and tokens."""
    shown: list[str] = []
    is_secret = False
    for argument in arguments:
        if argument.startswith("-"):
            name, equals, _ = argument.partition("=")
            is_secret = any(_is_option(argument, secret) for secret in SECRETS)
            shown.append(f"{name}=..." if is_secret and equals else argument)
        else:
            shown.append("..." if is_secret else argument)
    return shlex.join(shown)


def _is_option(argument: str, option: str) -> bool:
    """Return whether an argument may be an option; vLLM takes ``_`` for ``-``, and beginnings."""
    name = argument.partition("=")[0].replace("_", "-")
    return len(name) > len("--") and option.startswith(name)
