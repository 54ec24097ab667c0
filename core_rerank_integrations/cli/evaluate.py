"""``core-rerank evaluate``: measure rankings on judged questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from core_rerank_integrations import research
from core_rerank_integrations.cli.common import command
from core_rerank_integrations.research.options import EvaluationOptions


@command
def evaluate(
    options: EvaluationOptions,
    output: Annotated[
        Path,
        typer.Option(help="Folder for the report and the runs.", file_okay=False, writable=True),
    ],
    plots: Annotated[bool, typer.Option(help="Whether the report has plots.")] = False,
) -> None:
    """Compare a first stage and head sets on the same candidates, and test the differences.

    Methods that read the same prompts share one pass of the model.
    """
    from core_rerank_integrations.research.report import markdown

    evaluation = research.evaluate(options, show_progress=True)
    research.save_report(output, evaluation, plots)
    print(markdown(evaluation))
    print(f"Wrote {output}/report.md, report.json and one run per method")
