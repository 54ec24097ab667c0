"""``core-rerank evaluate``: what reranking brings on a judged collection."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from core_rerank_integrations.cli.common import (
    BackendOption,
    DtypeOption,
    ModelOption,
    clear_errors,
)
from core_rerank_integrations.models.resolve import DEFAULT_MODEL


def evaluate_command(
    beir: Annotated[Path, typer.Option(help="Folder in the layout of BEIR.")],
    run: Annotated[Path, typer.Option(help="TREC run of the first stage: the candidates.")],
    output: Annotated[Path, typer.Option(help="Folder for the report and the runs.")],
    split: Annotated[str, typer.Option(help="Which judgments.")] = "test",
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated: first-stage, icr (all heads), a kind of shipped head set "
            "(core, fit, qr, ...), its name or a file. NAME@8 takes the best 8 of its ranking, "
            "NAME+first-stage lets the first stage's order count, NAME+bm25 and NAME+vectors as "
            "that of such a one."
        ),
    ] = "first-stage,core,fit+first-stage",
    model: ModelOption = DEFAULT_MODEL,
    candidates: Annotated[int, typer.Option(min=1, help="Candidates a query.")] = 20,
    queries: Annotated[int | None, typer.Option(min=1, help="First queries only.")] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Documents a prompt; default each head set's.")
    ] = None,
    curve: Annotated[
        str | None, typer.Option(help="A head set whose ranking is tried at 1, 2, 4, ... heads.")
    ] = None,
    timed: Annotated[
        int, typer.Option(min=0, help="Queries by which each method is timed by itself.")
    ] = 5,
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
    plots: Annotated[bool, typer.Option(help="Draw pictures into the report.")] = False,
) -> None:
    """Measure first stage and head sets on the same candidates, and test the difference.

    Methods that want their prompts alike share one pass of the model.
    """
    from core_rerank_integrations.research import evaluate, save_report
    from core_rerank_integrations.research.report import markdown

    with clear_errors():
        evaluation = evaluate(
            beir,
            run,
            [name.strip() for name in methods.split(",")],
            model,
            split=split,
            candidates=candidates,
            queries=queries,
            window=window,
            curve=curve,
            timed=timed,
            backend=backend,
            dtype=dtype,
            show_progress=True,
        )
        save_report(output, evaluation, plots)
    print(markdown(evaluation))
    print(f"Wrote {output}/report.md, report.json and a run per method")
