"""``core-rerank rerank``: rank the documents of a file by a query."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from core_rerank_integrations.cli.common import command
from core_rerank_integrations.cli.documents import DocumentsFile, read_documents
from core_rerank_integrations.reranker import CoReReranker
from core_rerank_integrations.results import RerankResult, RerankResults
from core_rerank_integrations.settings import RerankerSettings, RerankOptions

STRONGEST_WORDS = 3

Format = Literal["text", "json", "trec"]


@command
def rerank(
    query: Annotated[str, typer.Option(help="The query to rank by.")],
    documents: DocumentsFile,
    options: RerankOptions,
    settings: RerankerSettings,
    output: Annotated[Format, typer.Option(help="Format of the results.")] = "text",
    query_id: Annotated[str, typer.Option(help="Query id in TREC output.")] = "1",
) -> None:
    """Rank the documents of a file by a query."""
    ids, texts = read_documents(documents)
    with CoReReranker(**dict(settings)) as reranker:
        results = reranker.rerank(query, texts, **options.model_dump())
    if output == "json":
        rows = [_row(result, ids[result.index]) for result in results]
        print(json.dumps(rows, ensure_ascii=False, indent=2))
    elif output == "trec":
        for rank, result in enumerate(results, start=1):
            print(f"{query_id} Q0 {ids[result.index]} {rank} {result.score:.6f} core-rerank")
    else:
        _print_table(results)


def _row(result: RerankResult, document_id: str) -> dict[str, Any]:
    row = {
        "index": result.index,
        "id": document_id,
        "score": result.score if result.reranked else None,
        "probability": result.probability,
        "best_passage": result.best_passage,
        "document": result.document,
    }
    if result.evidence:
        keys = ("start", "stop", "score")
        row["evidence"] = [{key: getattr(part, key) for key in keys} for part in result.evidence]
    return row


def _print_table(results: RerankResults) -> None:
    calibrated = any(result.probability is not None for result in results)
    label = "probability" if calibrated else "score"
    table = Table("rank", label, "document", box=None, pad_edge=False)
    for rank, result in enumerate(results, start=1):
        score = f"{result.relevance_score:.4f}" if result.reranked else "not read"
        table.add_row(str(rank), score, _highlighted(result))
    Console().print(table)
    if results.answerability is not None:
        print(f"\nProbability that a relevant document is in the list: {results.answerability:.4f}")


def _highlighted(result: RerankResult) -> Text:
    """Return the document, its best sentence in bold and that sentence's strongest words green."""
    text = Text(result.document)
    for best in result.evidence[:1]:
        text.stylize("bold", best.start, best.stop)
        for word in sorted(best.words, key=lambda word: -word.score)[:STRONGEST_WORDS]:
            text.stylize("green", word.start, word.stop)
    return text
