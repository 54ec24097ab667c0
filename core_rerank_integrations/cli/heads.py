"""``core-rerank heads``: list shipped head sets; find, fit and tune new ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from core_rerank_integrations import research
from core_rerank_integrations.cli.common import command, print_table
from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.heads.head_set import HeadSet
from core_rerank_integrations.heads.shipped import shipped_head_sets
from core_rerank_integrations.research.options import (
    AbstentionOptions,
    EvidenceOptions,
    FindOptions,
    FitOptions,
    TuneOptions,
)

app = typer.Typer(
    help="List, find, fit and tune head sets.", no_args_is_help=True, rich_markup_mode=None
)

OutputOption = Annotated[
    Path, typer.Option(help="Head set file to write.", dir_okay=False, writable=True)
]


@app.command("list")
def list_heads() -> None:
    """List the shipped head sets."""
    rows = [
        (
            head_set.name,
            head_set.model or "",
            str(len(head_set.heads)),
            f"{head_set.highest_layer + 1} of {head_set.num_layers}",
        )
        for head_set in shipped_head_sets().values()
    ]
    print_table(("name", "model", "heads", "layers that run"), rows)


@app.command()
@command
def find(
    options: FindOptions,
    output: OutputOption,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Image file to write: a map of the scores of all heads.",
            dir_okay=False,
            writable=True,
        ),
    ] = None,
) -> None:
    """Score every head on judged questions, and write the best ones as a head set.

    The scores of all heads go to <output>.scores.json.
    An interrupted run continues where it stopped.
    """
    if plot is not None:
        from core_rerank_integrations.research.plots import check_picture, plot_head_map

        check_picture(plot)
    options = options.model_copy(update={"name": options.name or output.stem})
    found = research.find_heads(options, show_progress=True)
    _write(found.head_set, output)
    found.scores.save(output.with_suffix(".scores.json"))
    if plot is not None:
        plot_head_map(found.head_set, plot)


@app.command()
@command
def fit(options: FitOptions, output: OutputOption) -> None:
    """Fit a sparse weight for every head, and write the head set that ranks --dev best.

    The attention of the model is cached on disk: a second fit takes seconds.
    """
    options = options.model_copy(update={"name": options.name or output.stem})
    fitted = research.fit_heads(options, show_progress=True)
    for trial in fitted.trials:
        print(f"l1 {trial.l1:g}: {trial.num_heads} heads, nDCG@10 on dev {trial.ndcg:.4f}")
    _write(fitted.head_set, output)


@app.command()
@command
def tune(options: TuneOptions, output: OutputOption) -> None:
    """Train an adapter and head weights together, and write them as a head set.

    The adapter is a folder beside the head set, with the same name. Time and memory are those of
    a small training: see the page "Tuning". An interrupted run continues where it stopped.
    """
    adapter = _adapter_folder(options, output)
    options = options.model_copy(update={"name": options.name or output.stem, "adapter": adapter})
    tuned = research.tune_heads(options, show_progress=True)
    tuned.save(output)
    print(f"Wrote {output} and {adapter}")


@app.command()
@command
def evidence(options: EvidenceOptions, output: OutputOption) -> None:
    """Fit the weights that score the sentences of a document.

    The ranking of the head set stays as it is.
    """
    research.fit_evidence(options, show_progress=True).save(output)
    print(f"Wrote {output}")


@app.command()
@command
def abstention(options: AbstentionOptions, output: OutputOption) -> None:
    """Fit the probability that a list holds a relevant document.

    It is fitted on lists with and without their relevant documents.
    The ranking of the head set stays as it is.
    """
    research.fit_abstention(options, show_progress=True).save(output)
    print(f"Wrote {output}")


def _adapter_folder(options: TuneOptions, output: Path) -> Path:
    """Return the folder of the adapter.

    Raises:
        InvalidInputError: It would be the file of the head set.
    """
    adapter = options.adapter or output.with_suffix("")
    if adapter == output:
        raise InvalidInputError(
            f"the head set and the folder of its adapter would both be {output}; name the file "
            f"{output}.json, or give another --adapter"
        )
    return adapter


def _write(head_set: HeadSet, output: Path) -> None:
    """Write a head set and print its heads."""
    head_set.save(output)
    rows = [
        (
            str(head.layer),
            str(head.head),
            "" if head.score is None else f"{head.score:.4f}",
            f"{head.weight:g}",
        )
        for head in head_set.heads
    ]
    print_table(("layer", "head", "score", "weight"), rows, head_set.name)
    weight = head_set.scoring.rank_weight
    first_stage = f"; the first stage has weight {weight:g}" if weight else ""
    print(f"{head_set.highest_layer + 1} of {head_set.num_layers} layers run{first_stage}")
    print(f"Wrote {output}")
