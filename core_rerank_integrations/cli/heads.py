"""``core-rerank heads``: the shipped head sets, and finding and fitting new ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console
from rich.table import Column, Table

from core_rerank_integrations.cli.common import (
    BackendOption,
    DtypeOption,
    ModelOption,
    clear_errors,
)
from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.heads.head_set import (
    PUBLISHED_CORE_HEADS,
    HeadSet,
    named_head_set,
    shipped_head_sets,
)
from core_rerank_integrations.models.resolve import DEFAULT_MODEL

if TYPE_CHECKING:
    from core_rerank_integrations.research import HeadReader
    from core_rerank_integrations.research.detection import Detection
    from core_rerank_integrations.research.weights import Trial

app = typer.Typer(help="Head sets: shipped, found, fitted.", no_args_is_help=True)

TemplateOption = Annotated[
    str | None, typer.Option(help="Prompt template; by default the model's.")
]
MaxLayerOption = Annotated[
    int | None, typer.Option(help="Highest layer that heads are taken from, counted from 0.")
]
PruneOption = Annotated[
    float | None,
    typer.Option(help="Share of the model's layers to leave out at its top, such as 0.5."),
]
CacheOption = Annotated[
    Path | None, typer.Option(help="Where what was read is kept, so that a run can go on.")
]
NameOption = Annotated[str | None, typer.Option(help="The head set's name; by default the file's.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the drawing of questions.")]


@app.command("list")
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
def find(
    data: Annotated[list[Path], typer.Option(help="Folder in the layout of BEIR. Repeatable.")],
    output: Annotated[Path, typer.Option(help="The head set file to write.")],
    run: Annotated[
        list[Path],
        typer.Option(help="TREC run that hard negatives are taken from; one for each --data."),
    ],
    split: Annotated[str, typer.Option(help="Which judgments.")] = "train",
    model: ModelOption = DEFAULT_MODEL,
    method: Annotated[str, typer.Option(help="core or qr.")] = "core",
    temperature: Annotated[
        list[float] | None,
        typer.Option(help="Of SCoRe; repeat for several at once: the first chooses."),
    ] = None,
    heads: Annotated[int, typer.Option(min=1, help="Heads to take.")] = PUBLISHED_CORE_HEADS,
    questions: Annotated[
        int | None, typer.Option(min=1, help="Questions to draw of each --data.")
    ] = 200,
    negatives: Annotated[int, typer.Option(help="Hard negatives in a prompt.")] = 19,
    positions: Annotated[int, typer.Option(help="Places of the relevant document.")] = 2,
    max_layer: MaxLayerOption = None,
    prune: PruneOption = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Window to rerank with, for the head set.")
    ] = None,
    reverse: Annotated[
        bool,
        typer.Option(help="Rerank with the best candidate next to the query, for the head set."),
    ] = False,
    seed: SeedOption = 0,
    template: TemplateOption = None,
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
    cache: CacheOption = None,
    name: NameOption = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the map of scores here.")] = None,
) -> None:
    """Score every head on judged questions, and write the best as a head set.

    Beside it, ``<output>.scores.json`` holds the scores of all heads. An interrupted run goes
    on where it was.
    """
    from core_rerank_integrations.research import JudgedRun, find_heads
    from core_rerank_integrations.research.detection import DEFAULT_TEMPERATURES

    with clear_errors():
        if len(data) != len(run):
            raise InvalidInputError(
                f"every --data needs a --run of its own: got {len(data)} and {len(run)}"
            )
        with _reader(model, max_layer, prune, template, backend, dtype, cache) as reader:
            found = find_heads(
                reader,
                [
                    JudgedRun(folder, split, path, questions)
                    for folder, path in zip(data, run, strict=True)
                ],
                cast("Detection", method),
                heads,
                negatives=negatives,
                positions=positions,
                temperatures=temperature or DEFAULT_TEMPERATURES,
                window=window,
                reverse=reverse,
                seed=seed,
                name=name or output.stem,
                show_progress=True,
            )
        found.head_set.save(output)
        found.scores.save(output.with_suffix(".scores.json"))
        if plot is not None:
            from core_rerank_integrations.research.plots import plot_head_map

            plot_head_map(found.head_set, plot)
    _print_heads(found.head_set)
    print(f"Wrote {output}")


@app.command()
def fit(
    train: Annotated[
        list[str],
        typer.Option(
            help="FOLDER:SPLIT:RUN[:N][:KIND] to fit on; RUN is a TREC run, or its name in the "
            "folder's runs/. N: draw so many questions. KIND: what the run is, bm25, vectors or, "
            "if it is no ranking, unordered. Repeatable."
        ),
    ],
    dev: Annotated[
        list[str], typer.Option(help="The same, to choose by. Repeatable, all count alike.")
    ],
    output: Annotated[Path, typer.Option(help="The head set file to write.")],
    model: ModelOption = DEFAULT_MODEL,
    window: Annotated[
        int,
        typer.Option(
            min=1,
            help="Documents a prompt. With 1 a score is of question and document alone, and is "
            "calibrated as a probability on --dev.",
        ),
    ] = 1,
    reverse: Annotated[
        bool, typer.Option(help="Show a prompt's documents last first, the best next to the query.")
    ] = False,
    passage_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Rank longer documents by their best passage of that length."),
    ] = None,
    candidates: Annotated[int, typer.Option(min=2, help="Candidates a question to fit on.")] = 20,
    dev_candidates: Annotated[int, typer.Option(min=2, help="The same, to choose by.")] = 20,
    l1: Annotated[
        list[float] | None, typer.Option(help="Strength of the penalty; repeat for several.")
    ] = None,
    max_heads: Annotated[int | None, typer.Option(min=1, help="Most heads.")] = None,
    max_layer: MaxLayerOption = None,
    prune: PruneOption = None,
    seed: SeedOption = 0,
    template: TemplateOption = None,
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
    cache: CacheOption = None,
    name: NameOption = None,
) -> None:
    """Fit a sparse weight for every head, and write the head set that ranks best on --dev.

    What the model says about a list is kept on disk: a second fit takes seconds.
    """
    from core_rerank_integrations.research import JudgedRun, fit_heads
    from core_rerank_integrations.research.weights import DEFAULT_STRENGTHS

    with clear_errors():
        fitted_on = [JudgedRun.parse(text) for text in train]
        judged_by = [JudgedRun.parse(text) for text in dev]
        with _reader(model, max_layer, prune, template, backend, dtype, cache) as reader:
            fitted = fit_heads(
                reader,
                fitted_on,
                judged_by,
                window=window,
                reverse=reverse,
                passage_tokens=passage_tokens,
                candidates=candidates,
                dev_candidates=dev_candidates,
                strengths=l1 or DEFAULT_STRENGTHS,
                max_heads=max_heads,
                seed=seed,
                name=name or output.stem,
                on_trial=_print_trial,
                show_progress=True,
            )
        fitted.head_set.save(output)
    _print_heads(fitted.head_set)
    print(f"Wrote {output}")


@app.command()
def evidence(
    heads: Annotated[str, typer.Option(help="Shipped head set or head set file.")],
    data: Annotated[
        Path, typer.Option(help="Folder in the layout of BEIR, with answers in queries.jsonl.")
    ],
    output: Annotated[Path, typer.Option(help="The head set file to write.")],
    split: Annotated[str, typer.Option(help="Which judgments.")] = "train",
    questions: Annotated[
        int | None, typer.Option(min=1, help="Relevant documents to draw; by default all.")
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    seed: SeedOption = 0,
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Fit by which weights the heads tell the sentence with the answer from the others.

    How the head set ranks stays as it is; the weights are those of its evidence.
    """
    from core_rerank_integrations.research import fit_evidence

    with clear_errors():
        fitted = fit_evidence(
            named_head_set(heads),
            data,
            split,
            questions,
            model,
            seed=seed,
            backend=backend,
            dtype=dtype,
            show_progress=True,
        )
        fitted.save(output)
    print(f"Wrote {output}")


@app.command()
def abstention(
    heads: Annotated[str, typer.Option(help="Shipped head set or head set file, calibrated.")],
    lists: Annotated[
        list[str],
        typer.Option(help="Judged lists: FOLDER:SPLIT:RUN[:N][:KIND], as for fit. Repeatable."),
    ],
    output: Annotated[Path, typer.Option(help="The head set file to write.")],
    candidates: Annotated[int, typer.Option(min=2, help="Candidates a question.")] = 20,
    lost: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Share of lists with something relevant that may come back empty."
        ),
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    seed: SeedOption = 0,
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Fit when nothing in a list is relevant, on lists whose relevant documents are taken out.

    How the head set ranks stays as it is.
    """
    from core_rerank_integrations.research import JudgedRun, fit_abstention
    from core_rerank_integrations.research.fit_abstention import LOST

    with clear_errors():
        fitted = fit_abstention(
            named_head_set(heads),
            [JudgedRun.parse(text) for text in lists],
            model,
            candidates=candidates,
            lost=LOST if lost is None else lost,
            seed=seed,
            backend=backend,
            dtype=dtype,
            show_progress=True,
        )
        fitted.save(output)
    print(f"Wrote {output}")


def _reader(
    model: str,
    max_layer: int | None,
    prune: float | None,
    template: str | None,
    backend: str,
    dtype: str,
    cache: Path | None,
) -> HeadReader:
    from core_rerank_integrations.research import HeadReader

    return HeadReader(
        model,
        max_layer=max_layer,
        prune=prune,
        template=template,
        backend=backend,
        dtype=dtype,
        cache=cache,
    )


def _print_trial(trial: Trial) -> None:
    print(
        f"l1 {trial.weights.l1:g}: {trial.num_heads} heads, nDCG@10 on dev {trial.score:.4f}",
        flush=True,
    )


def _print_heads(head_set: HeadSet) -> None:
    table = Table("layer", "head", "score", "weight", title=head_set.name, title_justify="left")
    for head in head_set.heads:
        score = "" if head.score is None else f"{head.score:.4f}"
        table.add_row(str(head.layer), str(head.head), score, f"{head.weight:g}")
    Console().print(table)
    first_stage = head_set.scoring.rank_weight
    Console().print(
        f"{head_set.highest_layer + 1} of {head_set.num_layers} layers run"
        + (f"; first stage {first_stage:g}" if first_stage else "")
    )
