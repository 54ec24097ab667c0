"""``core-rerank heads``: the shipped head sets, and finding and fitting new ones."""

from __future__ import annotations

import platform
import random
import re
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

import typer
from rich.console import Console
from rich.table import Column, Table

from core_rerank_integrations import __version__
from core_rerank_integrations.cli.common import BackendOption, DtypeOption, clear_errors
from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.heads import PUBLISHED_CORE_HEADS, HeadSet, Ranked, shipped_head_sets
from core_rerank_integrations.models import DEFAULT_MODEL
from core_rerank_integrations.progress import tracked

app = typer.Typer(help="Head sets: shipped, found, fitted.", no_args_is_help=True)

ModelOption = Annotated[str, typer.Option(help="Alias, hub id, folder or GGUF.")]
TemplateOption = Annotated[str | None, typer.Option(help="Prompt template; default the model's.")]
MaxLayerOption = Annotated[
    int | None, typer.Option(help="Highest layer heads are taken from, counted from 0.")
]
PruneOption = Annotated[
    float | None,
    typer.Option(help="Share of the model's layers to leave out at its top, such as 0.5."),
]
CacheOption = Annotated[
    Path | None, typer.Option(help="Where what was read is kept, so that a run can go on.")
]
SHARED_FIELDS = {
    "name", "model", "model_type", "num_layers", "num_heads", "template", "window"
}  # fmt: skip
"""What a head set says of anything but its heads."""

NameOption = Annotated[str | None, typer.Option(help="The head set's name; default the file's.")]


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
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
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
    from core_rerank_integrations.finding.collection import Collection, load_run
    from core_rerank_integrations.finding.detection import (
        DEFAULT_TEMPERATURES,
        detection_cases,
        score_heads,
    )
    from core_rerank_integrations.finding.features import HeadReader

    with clear_errors():
        if method not in ("core", "qr"):
            raise InvalidInputError(f"--method must be core or qr, got {method!r}")
        if len(data) != len(run):
            raise InvalidInputError(
                f"every --data needs a --run of its own: got {len(data)} and {len(run)}"
            )
        cases = []
        for folder, path in zip(data, run, strict=True):
            collection = Collection.load(folder, split)
            ranked = load_run(path, collection)
            cases += detection_cases(collection, ranked, questions, negatives, positions, seed)
        temperatures = tuple(temperature or DEFAULT_TEMPERATURES)
        with HeadReader(
            model, _highest(model, max_layer, prune), template, backend, dtype, cache=cache
        ) as reader:
            scores = score_heads(
                reader.read,
                reader.heads.heads,
                tracked(cases, len(cases), "Finding heads"),
                temperatures,
            )
        ranking = scores.ranking(method)
        found = _described(reader, name or output.stem, window).model_copy(
            update={
                "method": method,
                "reverse": reverse,
                "heads": HeadSet.from_ranking(ranking, heads).heads,
                "ranking": tuple(ranking),
                "provenance": {
                    "source": "core-rerank heads find",
                    "data": [folder.name for folder in data],
                    "split": split,
                    "run": [path.name for path in run],
                    "questions": len(cases) // positions,
                    "negatives": negatives,
                    "positions": positions,
                    "prompts": scores.prompts,
                    **({"temperature": temperatures[0]} if method == "core" else {}),
                    "seed": seed,
                    **_versions(dtype),
                },
            }
        )
        found.save(output)
        scores.save(output.with_suffix(".scores.json"))
        if plot is not None:
            from core_rerank_integrations.finding.plots import plot_head_map

            plot_head_map(found, plot)
    _print_heads(found)
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
    candidates: Annotated[int, typer.Option(min=2, help="Candidates a question to fit on.")] = 20,
    dev_candidates: Annotated[int, typer.Option(min=2, help="The same, to choose by.")] = 20,
    l1: Annotated[
        list[float] | None, typer.Option(help="Strength of the penalty; repeat for several.")
    ] = None,
    max_heads: Annotated[int | None, typer.Option(min=1, help="Most heads.")] = None,
    max_layer: MaxLayerOption = None,
    prune: PruneOption = None,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    template: TemplateOption = None,
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
    cache: CacheOption = None,
    name: NameOption = None,
) -> None:
    """Fit a sparse weight for every head, and write the head set that ranks best on --dev.

    What the model says about a list is kept on disk: a second fit takes seconds.
    """
    from core_rerank_integrations.finding.features import HeadReader
    from core_rerank_integrations.finding.fitting import (
        DEFAULT_STRENGTHS,
        calibrate,
        choose_first_stage,
        choose_weights,
        judged_lists,
        teaching,
    )

    with clear_errors():
        sources = [_Source.parse(text) for text in train]
        judges = [_Source.parse(text) for text in dev]
        # Dev draws first, so that what it judges by stays the same however much is fitted on.
        drawn = _Draw(seed)
        judging_by = [(source, *drawn.load(source)) for source in judges]
        fitting_on = [(source, *drawn.load(source)) for source in sources]
        useful = [
            (source, collection, ranked, teaching(collection, ranked, queries, candidates))
            for source, collection, ranked, queries in fitting_on
        ]
        depths = [candidates] * len(sources) + [dev_candidates] * len(judges)
        with HeadReader(
            model, _highest(model, max_layer, prune), template, backend, dtype, cache=cache
        ) as reader:
            lists = [
                judged_lists(
                    reader,
                    collection,
                    ranked,
                    queries,
                    window,
                    depth,
                    source.ranked,
                    reverse,
                    partial(tracked, what=source.folder.name),
                )
                for (source, collection, ranked, queries), depth in zip(
                    useful + judging_by, depths, strict=True
                )
            ]
            taught = [item for group in lists[: len(sources)] for item in group]
            judging = {
                text: (collection, group)
                for text, (_, collection, _, _), group in zip(
                    dev, judging_by, lists[len(sources) :], strict=True
                )
            }
            best, _ = choose_weights(
                taught,
                judging,
                l1 or DEFAULT_STRENGTHS,
                max_heads=max_heads,
                progress=_show_trial,
            )
        calibration = None
        if window == 1:
            calibration = calibrate(
                [(best.weights.scores(item), item.grades) for item in group]
                for _, group in judging.values()
            )
        described = _described(reader, name or output.stem, window)
        places = [(head.layer, head.head) for head in reader.heads.heads]
        fitted = best.weights.head_set(
            places,
            **described.model_dump(include=SHARED_FIELDS),
            reverse=reverse,
            **choose_first_stage(best.weights, judging)._asdict(),
            calibration=calibration,
            provenance={
                "source": "core-rerank heads fit",
                "train": [item[0].label(len(item[3])) for item in fitting_on],
                "dev": [item[0].label(len(item[3])) for item in judging_by],
                "lists": len(taught),
                "candidates": candidates,
                "dev_candidates": dev_candidates,
                "l1": best.weights.l1,
                "dev_ndcg10": round(best.score, 4),
                "seed": seed,
                **_versions(dtype),
            },
        )
        fitted.save(output)
    _print_heads(fitted)
    print(f"Wrote {output}")


def _show_trial(trial: Any) -> None:
    print(
        f"l1 {trial.weights.l1:g}: {trial.num_heads} heads, nDCG@10 on dev {trial.score:.4f}",
        flush=True,
    )


class _Source(NamedTuple):
    """A judged collection with candidates, as written on the command line."""

    folder: Path
    split: str
    run: Path
    questions: int | None
    ranked: Ranked

    @classmethod
    def parse(cls, text: str) -> _Source:
        match = re.fullmatch(
            r"(?P<folder>[^:]+):(?P<split>[^:]+):(?P<run>[^:]+)(:(?P<count>[1-9]\d*))?"
            r"(:(?P<kind>unordered|bm25|vectors))?",
            text,
        )
        if match is None:
            raise InvalidInputError(f"expected FOLDER:SPLIT:RUN[:N][:KIND], got {text!r}")
        folder, split, run = Path(match["folder"]), match["split"], Path(match["run"])
        named = folder / "runs" / f"{split}.{run}.trec"
        count = int(match["count"]) if match["count"] else None
        run = named if named.exists() else run
        ranked = False if match["kind"] == "unordered" else match["kind"] or True
        return cls(folder, split, run, count, cast(Ranked, ranked))

    def label(self, questions: int) -> str:
        """What goes into a head set's provenance."""
        order = "" if self.ranked is True else f", {self.ranked or 'unordered'}"
        return f"{self.folder.name}, {self.split}, {self.run.name}, {questions} questions{order}"


class _Draw:
    """Draws questions, none of them twice: what is fitted on is not judged by."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._taken: set[tuple[Path, str]] = set()

    def load(self, source: _Source) -> tuple[Any, Any, list[str]]:
        """Collection, run, and the questions drawn from it."""
        from core_rerank_integrations.finding.collection import Collection, load_scored_run

        collection = Collection.load(source.folder, source.split)
        run = load_scored_run(source.run, collection)
        shuffled = sorted(run)
        random.Random(self._seed).shuffle(shuffled)
        folder = source.folder.resolve()
        free = [query for query in shuffled if (folder, query) not in self._taken]
        drawn = free[: source.questions]
        if not drawn or len(drawn) < (source.questions or 1):
            raise InvalidInputError(
                f"{source.folder}, {source.split}: {source.questions or 'some'} questions were "
                f"asked for, and {len(free)} of {len(shuffled)} are left"
            )
        self._taken.update((folder, query) for query in drawn)
        return collection, run, drawn


def _highest(model: str, max_layer: int | None, prune: float | None) -> int | None:
    """The highest layer to read, of whichever way it is given."""
    if prune is None:
        return max_layer
    if max_layer is not None:
        raise InvalidInputError("give --max-layer or --prune, not both")
    if not 0 <= prune < 1:
        raise InvalidInputError(f"--prune must be at least 0 and below 1, got {prune}")
    from core_rerank_integrations.models import model_shape, resolve

    layers = model_shape(resolve(model).config()).num_layers
    return max(1, round((1 - prune) * layers)) - 1


def _described(reader: Any, name: str, window: int | None) -> HeadSet:
    """All but the heads: name, model, template, window."""
    from core_rerank_integrations.prompt import TEMPLATES

    template: str | None = reader.template.name
    described: HeadSet = reader.heads.model_copy(
        update={
            "name": name,
            "template": template if template in TEMPLATES else None,
            "window": window,
        }
    )
    return described


def _versions(dtype: str) -> dict[str, str]:
    versions = {}
    for package in ("torch", "transformers", "vllm"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "dtype": dtype,
        "core-rerank-integrations": __version__,
        **versions,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _print_heads(head_set: HeadSet) -> None:
    table = Table("layer", "head", "score", "weight", title=head_set.name, title_justify="left")
    for head in head_set.heads:
        score = "" if head.score is None else f"{head.score:.4f}"
        table.add_row(str(head.layer), str(head.head), score, f"{head.weight:g}")
    Console().print(table)
    Console().print(
        f"{head_set.highest_layer + 1} of {head_set.num_layers} layers run"
        + (f"; first stage {head_set.first_stage_weight:g}" if head_set.first_stage_weight else "")
    )
