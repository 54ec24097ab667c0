"""What the commands share: options of a model, and errors without tracebacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console

from core_rerank_integrations.errors import CoReError

ModelOption = Annotated[str, typer.Option(help="Alias, hub id, folder or GGUF file.")]
BackendOption = Annotated[
    str, typer.Option(help="auto, openvino, transformers, vllm or vllm-shared.")
]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or int8.")]


@contextmanager
def clear_errors() -> Iterator[None]:
    """What went wrong, without a traceback: the message says what to do."""
    try:
        yield
    except CoReError as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", markup=True, highlight=False)
        raise typer.Exit(1) from error
