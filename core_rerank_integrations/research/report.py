"""Reports of an evaluation: tables, runs, the values of every query, and pictures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from pydantic import JsonValue

from core_rerank_integrations._internal.files import write_atomically
from core_rerank_integrations.research.collection import save_run
from core_rerank_integrations.research.evaluation import Evaluation
from core_rerank_integrations.research.measures import (
    MAIN_MEASURE,
    MEASURES,
    expected_calibration_error,
)
from core_rerank_integrations.research.methods import Method, plain_name
from core_rerank_integrations.research.plots import (
    plot_costs,
    plot_gains,
    plot_head_counts,
    plot_head_map,
    plot_reliability,
)


def save_report(folder: Path, evaluation: Evaluation, plots: bool = False) -> None:
    """Write ``report.json``, ``report.md`` and a TREC run per method into ``folder``.

    Args:
        folder: The folder; it is created if needed.
        evaluation: Result of `evaluate`.
        plots: Whether to draw pictures.

    Raises:
        StorageError: A file cannot be written.
    """
    for result in evaluation.results:
        name = result.method.name
        save_run(folder / f"{name}.trec", result.rankings, tag=name)
    content = {
        "about": evaluation.about,
        "methods": {
            result.method.name: {
                "heads": _described(result.method),
                "mean": result.means,
                "p_value": result.p_value,
                "seconds": result.seconds,
                "reliability": [part._asdict() for part in result.reliability],
                "per_query": result.measured,
            }
            for result in evaluation.results
        },
    }
    pictures = _draw(folder, evaluation) if plots else []
    write_atomically(folder / "report.json", json.dumps(content, indent=1) + "\n")
    write_atomically(folder / "report.md", markdown(evaluation, pictures))


def markdown(evaluation: Evaluation, pictures: Sequence[str] = ()) -> str:
    """Return the report as Markdown.

    Args:
        evaluation: Result of `evaluate`.
        pictures: Names of pictures in the same folder.
    """
    results = evaluation.results
    lines = ["# Evaluation", ""]
    lines += [f"- {name}: {value}" for name, value in evaluation.about.items()]
    lines += ["", "| method | heads | layers | " + " | ".join(MEASURES) + " | p | ms a query |"]
    lines += ["| --- " * (len(MEASURES) + 5) + "|"]
    best = max(results, key=lambda result: result.means[MAIN_MEASURE])
    for result in results:
        heads = result.method.heads
        cells = [
            f"**{result.method.name}**" if result is best else result.method.name,
            str(len(heads.heads)) if heads else "",
            str(heads.highest_layer + 1) if heads else "",
            *(f"{result.means[name]:.3f}" for name in MEASURES),
            "" if result.p_value is None else f"{result.p_value:.2g}",
            f"{1000 * statistics.median(result.seconds):.0f}" if result.seconds else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"p: two-sided paired t-test of {MAIN_MEASURE} against the first stage. Times are medians "
        "of one rerank with all its candidates.",
    ]
    lines += [
        f"\nExpected calibration error of {result.method.name}: "
        f"{expected_calibration_error(result.reliability):.3f}"
        for result in results
        if result.reliability
    ]
    lines += [f"\n![{name}]({name})" for name in pictures]
    return "\n".join(lines) + "\n"


def _described(method: Method) -> dict[str, JsonValue] | None:
    if method.heads is None:
        return None
    described: dict[str, JsonValue] = method.heads.model_dump(
        mode="json", exclude_defaults=True, exclude={"provenance": {"ranked_heads"}}
    )
    return {**described, "first_stage": method.first_stage}


def _draw(folder: Path, evaluation: Evaluation) -> list[str]:
    """Draw the pictures; return their names."""
    pictures = []
    named = [result for result in evaluation.results if "@" not in result.method.name]
    for result in named:
        heads = result.method.heads
        if heads is not None and heads.provenance.ranked_heads:
            pictures.append(f"map-{plain_name(heads.name)}.png")
            plot_head_map(heads, folder / pictures[-1])
    if evaluation.curve:
        counts = {
            int(result.method.name.partition("@")[2]): result.means[MAIN_MEASURE]
            for result in evaluation.results
            if "@" in result.method.name
        }
        others = {result.method.name: result.means[MAIN_MEASURE] for result in named}
        pictures.append("heads.png")
        plot_head_counts(counts, others, folder / pictures[-1])
    for result in evaluation.results:
        if result.reliability:
            pictures.append(f"reliability-{result.method.name}.png")
            plot_reliability(result, folder / pictures[-1])
    if any(result.seconds for result in evaluation.results):
        pictures.append("costs.png")
        plot_costs(evaluation.results, folder / pictures[-1])
    first_stage = next((result for result in named if result.method.heads is None), None)
    reranked = [result for result in named if result.method.heads is not None]
    if first_stage is not None and reranked:
        best = max(reranked, key=lambda result: result.means[MAIN_MEASURE])
        pictures.append("gains.png")
        plot_gains(best, first_stage, folder / pictures[-1])
    return pictures
