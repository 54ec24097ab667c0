"""``core-rerank rerank``: rank the documents of a file by a query."""

from __future__ import annotations

import codecs
import json
import re
import sys
from typing import Annotated, Any, Literal

import typer
from rich.text import Text

from core_rerank_integrations.cli.common import command, print_table
from core_rerank_integrations.cli.documents import DocumentsFile, read_documents
from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.ranking import check_candidates
from core_rerank_integrations.reranker import CoReReranker
from core_rerank_integrations.results import RerankResult, RerankResults
from core_rerank_integrations.settings import RerankerSettings, RerankOptions

STRONGEST_WORDS = 3
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters besides tabs and new lines; some would change the terminal."""

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
    check_candidates(query, texts)  # Before a model is downloaded or loaded.
    if output == "trec":
        _check_trec(query_id, *ids)
    with CoReReranker(**dict(settings)) as reranker:
        results = reranker.rerank(query, texts, **options.model_dump())
    if output == "json":
        rows = [_row(result, ids[result.index]) for result in results]
        # Other encodings lack characters, and JSON has escapes for all.
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        is_utf8 = codecs.lookup(encoding).name == "utf-8"
        print(json.dumps(rows, ensure_ascii=not is_utf8, indent=2))
    elif output == "trec":
        for rank, result in enumerate(results, start=1):
            print(f"{query_id} Q0 {ids[result.index]} {rank} {result.score:.9g} core-rerank")
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


def _check_trec(*ids: str) -> None:
    for name in ids:
        if name.split() != [name]:
            raise InvalidInputError(
                f"the id {name!r} cannot be written as TREC, whose columns are separated by white "
                "space; use --output json or other ids"
            )


def _print_table(results: RerankResults) -> None:
    calibrated = any(result.probability is not None for result in results)
    rows = [
        (
            str(rank),
            f"{result.relevance_score:.4f}" if result.reranked else "not read",
            _highlighted(result),
        )
        for rank, result in enumerate(results, start=1)
    ]
    print_table(("rank", "probability" if calibrated else "score", "document"), rows)
    if results.answerability is not None:
        print(f"\nProbability that a relevant document is in the list: {results.answerability:.4f}")


def _highlighted(result: RerankResult) -> Text:
    """Return the document, its best sentence in bold and that sentence's strongest words green."""
    # Rich drops some control characters, which would move the spans, and prints the others.
    text = Text(CONTROL.sub("\N{REPLACEMENT CHARACTER}", result.document))
    for best in result.evidence[:1]:
        text.stylize("bold", best.start, best.stop)
        for word in sorted(best.words, key=lambda word: -word.score)[:STRONGEST_WORDS]:
            text.stylize("green", word.start, word.stop)
    return text
