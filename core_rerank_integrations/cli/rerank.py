"""``core-rerank rerank``: the documents of a file, ranked by a query."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from core_rerank_integrations.cli.common import (
    BackendOption,
    DtypeOption,
    HeadsOption,
    ModelOption,
    clear_errors,
)
from core_rerank_integrations.cli.documents import DocumentsFile, read_documents
from core_rerank_integrations.heads.scoring_config import Ranked
from core_rerank_integrations.models.resolve import DEFAULT_MODEL
from core_rerank_integrations.results import RerankResult

STRONGEST_WORDS = 3


class Format(StrEnum):
    """How results are printed."""

    TEXT = "text"
    JSON = "json"
    TREC = "trec"


class FirstStageName(StrEnum):
    """What may have ranked the documents that are handed over."""

    BM25 = "bm25"
    VECTORS = "vectors"
    OTHER = "other"


RANKED: dict[FirstStageName | None, Ranked] = {
    None: False,
    FirstStageName.OTHER: True,
    FirstStageName.BM25: "bm25",
    FirstStageName.VECTORS: "vectors",
}


def rerank(
    query: Annotated[str, typer.Option(help="What is asked.")],
    documents: DocumentsFile,
    top_n: Annotated[int | None, typer.Option(min=1, help="Most results; default all.")] = None,
    model: ModelOption = DEFAULT_MODEL,
    heads: HeadsOption = None,
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
    window: Annotated[int | None, typer.Option(min=1, help="Most documents a prompt.")] = None,
    first_stage: Annotated[
        FirstStageName | None,
        typer.Option(help="What ranked the documents, best first; default: nothing did."),
    ] = None,
    evidence: Annotated[
        bool, typer.Option(help="Tell which sentences of each document speak for it.")
    ] = False,
    query_id: Annotated[str, typer.Option(help="Query id in TREC output.")] = "1",
    output: Annotated[Format, typer.Option(help="text, json or trec.")] = Format.TEXT,
) -> None:
    """Rank the documents of a file by a query."""
    from core_rerank_integrations.reranker import CoReReranker

    with clear_errors():
        ids, texts = read_documents(documents)
        with CoReReranker(
            model, heads=heads, backend=backend, dtype=dtype, window=window
        ) as reranker:
            results = reranker.rerank(
                query, texts, top_n=top_n, ranked=RANKED[first_stage], evidence=evidence
            )
    _print_results(results, ids, query_id, output)


def _print_results(
    results: list[RerankResult], ids: list[str], query_id: str, output: Format
) -> None:
    if output is Format.JSON:
        rows = [
            {
                "index": result.index,
                "id": ids[result.index],
                "score": result.score,
                "probability": result.probability,
                "passage": result.passage,
                "document": result.document,
                **({"evidence": _spans(result)} if result.evidence else {}),
            }
            for result in results
        ]
        print(json.dumps(rows, ensure_ascii=False, indent=2))
    elif output is Format.TREC:
        for rank, result in enumerate(results, start=1):
            print(f"{query_id} Q0 {ids[result.index]} {rank} {result.score:.6f} core-rerank")
    else:
        calibrated = any(result.probability is not None for result in results)
        label = "probability" if calibrated else "score"
        table = Table("rank", label, "document", box=None, pad_edge=False)
        for rank, result in enumerate(results, start=1):
            table.add_row(str(rank), f"{result.relevance_score:.4f}", _highlighted(result))
        Console().print(table)


def _spans(result: RerankResult) -> list[dict[str, float]]:
    return [
        {"start": part.start, "stop": part.stop, "score": part.score} for part in result.evidence
    ]


def _highlighted(result: RerankResult) -> Text:
    """The document, with its best sentence in bold and the strongest words of it in colour."""
    text = Text(result.document)
    for best in result.evidence[:1]:
        text.stylize("bold", best.start, best.stop)
        strongest = sorted(best.words, key=lambda word: -word.score)[:STRONGEST_WORDS]
        for word in strongest:
            text.stylize("green", word.start, word.stop)
    return text
