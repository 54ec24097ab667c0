"""``core-rerank evaluate``: what reranking brings on a judged collection."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from core_rerank_integrations.cli.common import BackendOption, DtypeOption, clear_errors
from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.heads import Ranked
from core_rerank_integrations.models import DEFAULT_MODEL
from core_rerank_integrations.progress import tracked

if TYPE_CHECKING:
    from core_rerank_integrations.finding.evaluation import Method, MethodResult
    from core_rerank_integrations.models import LocalModel

CURVE = (1, 2, 4, 8, 16, 32, 64, 128, 256)
RANKED: dict[str, Ranked] = {"first-stage": True, "bm25": "bm25", "vectors": "vectors"}


def evaluate(
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
    model: Annotated[str, typer.Option(help="Alias, hub id, folder or GGUF.")] = DEFAULT_MODEL,
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
    from core_rerank_integrations.finding.collection import Collection, load_run
    from core_rerank_integrations.finding.evaluation import (
        JointReranker,
        compare,
        markdown,
        rank_all,
        save_report,
        time_method,
    )
    from core_rerank_integrations.models import resolve
    from core_rerank_integrations.reranker import CoReReranker

    with clear_errors():
        collection = Collection.load(beir, split, partial=True)
        judged = {document for grades in collection.qrels.values() for document in grades}
        ranked = {query: run_[:candidates] for query, run_ in load_run(run, collection).items()}
        asked = list(collection.queries)[:queries]
        local_model = resolve(model)
        chosen = [_method(name.strip(), local_model) for name in methods.split(",")]
        chosen += _curve(curve, local_model)
        if window is not None:
            chosen = [method.in_windows_of(window) for method in chosen]
        if repeated := {m.name for m in chosen if [o.name for o in chosen].count(m.name) > 1}:
            raise InvalidInputError(f"methods named twice: {', '.join(sorted(repeated))}")

        if not any(method.heads for method in chosen):
            raise InvalidInputError("name at least one method beside the first stage")
        joint = JointReranker(local_model, chosen, backend, dtype)
        try:
            scores = partial(joint.scores, tracked=partial(tracked, what="Reading"))
            rankings = rank_all(collection, ranked, scores, asked)
        finally:
            joint.close()
        results = compare(collection.qrels, chosen, rankings)
        for result in results:
            if timed and result.method.heads is not None and "@" not in result.method.name:
                with CoReReranker(
                    local_model.path,
                    heads=result.method.heads.model_copy(update={"model": None}),
                    backend=backend,
                    dtype=dtype,
                ) as reranker:
                    result.seconds = time_method(reranker, collection, ranked, asked[:timed])
        about = {
            "collection": f"{beir.name}, {split}",
            "queries": len(asked),
            "first stage": f"{run.name}, {candidates} candidates",
            "judged documents outside the corpus": len(judged - collection.passages.keys()),
            "model": model,
            "window": window or "each head set's own",
            "backend and dtype": f"{backend}, {dtype}",
            "date": time.strftime("%Y-%m-%d"),
        }
        pictures = _draw(output, results, curve) if plots else []
        save_report(output, results, about, pictures)
        print(markdown(results, about))
        print(f"Wrote {output}/report.md, report.json and a run per method")


def _method(text: str, model: LocalModel) -> Method:
    from core_rerank_integrations.finding.evaluation import FIRST_STAGE, Method
    from core_rerank_integrations.heads import HeadSet, named_head_set, shipped_head_sets
    from core_rerank_integrations.models import model_shape

    if text == FIRST_STAGE:
        return Method(text)
    _, plus, kind = text.rpartition("+")
    ranked = RANKED.get(kind, False) if plus else False
    suffix = f"+{kind}" if ranked else ""
    name, _, count = text.removesuffix(suffix).partition("@")
    shape = model_shape(model.config())
    kinds = {
        head_set.kind: head_set
        for head_set in reversed(shipped_head_sets().values())
        if model.model_id is not None
        and model.model_id in (head_set.model, *head_set.model_aliases)
    }
    if name == "icr":
        heads = HeadSet.every(shape)
    elif name in kinds:
        heads = kinds[name]
    else:
        heads = named_head_set(name)
        name = heads.name  # A file's path would be no name for a run.
    heads.check(model.model_id, shape)
    label = f"{name}{f'@{count}' if count else ''}{suffix}"
    if count:
        if not count.isdigit():
            raise InvalidInputError(f"expected a number of heads after @, got {text!r}")
        heads = heads.top(int(count))
    return Method(label, heads, ranked)


def _curve(name: str | None, model: LocalModel) -> list[Method]:
    if name is None:
        return []
    heads = _method(name, model).heads
    if heads is None or not heads.ranking:
        raise InvalidInputError(f"--curve needs a head set with a ranking, and {name} has none")
    counts = [count for count in CURVE if count < len(heads.ranking)]
    return [_method(f"{name}@{count}", model) for count in (*counts, len(heads.ranking))]


def _draw(folder: Path, results: list[MethodResult], curve: str | None) -> list[str]:
    from core_rerank_integrations.finding import plots
    from core_rerank_integrations.finding.evaluation import MAIN_MEASURE

    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    named = [result for result in results if "@" not in result.method.name]
    for result in named:
        if result.method.heads is not None and result.method.heads.ranking:
            pictures.append(f"map-{result.method.heads.name}.png")
            plots.plot_head_map(result.method.heads, folder / pictures[-1])
    if curve:
        counts = {
            int(result.method.name.partition("@")[2]): result.means[MAIN_MEASURE]
            for result in results
            if "@" in result.method.name
        }
        others = {result.method.name: result.means[MAIN_MEASURE] for result in named}
        pictures.append("heads.png")
        plots.plot_head_counts(counts, others, folder / pictures[-1])
    for result in results:
        if result.reliability:
            pictures.append(f"reliability-{result.method.name}.png")
            plots.plot_reliability(result, folder / pictures[-1])
    if any(result.seconds for result in results):
        pictures.append("costs.png")
        plots.plot_costs(results, folder / pictures[-1])
    baseline = next((result for result in results if result.method.heads is None), None)
    reranked = [result for result in named if result.method.heads is not None]
    if baseline is not None and reranked:
        best = max(reranked, key=lambda result: result.means[MAIN_MEASURE])
        pictures.append("gains.png")
        plots.plot_gains(best, baseline, folder / pictures[-1])
    return pictures
