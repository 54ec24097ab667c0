"""Pictures of heads and of evaluations."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from core_rerank_integrations._internal.files import write_atomically
from core_rerank_integrations.errors import InvalidInputError, requires_extra
from core_rerank_integrations.heads.head_set import HeadSet
from core_rerank_integrations.research.evaluation import MethodResult
from core_rerank_integrations.research.measures import MAIN_MEASURE, expected_calibration_error
from core_rerank_integrations.research.methods import plain_name

with requires_extra("eval"):
    from matplotlib.backend_bases import FigureCanvasBase
    from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_head_map(head_set: HeadSet, path: Path) -> None:
    """Draw the score of every ranked head, layer by head; selected heads are framed."""
    ranked = head_set.provenance.ranked_heads
    layers = head_set.num_layers or 1 + max(layer for layer, _, _ in ranked)
    heads = head_set.num_heads or 1 + max(head for _, head, _ in ranked)
    scores = np.full((layers, heads), np.nan)
    for layer, head, score in ranked:
        scores[layer, head] = np.nan if score is None else score
    figure, axes = _figure(width=max(4.0, 0.3 * heads + 2), height=max(3.0, 0.2 * layers + 1))
    image = axes.imshow(scores, aspect="auto", origin="lower", cmap="viridis")
    figure.colorbar(image, label=f"{head_set.provenance.method} score")
    axes.scatter(
        [head.head for head in head_set.heads],
        [head.layer for head in head_set.heads],
        s=60,
        facecolors="none",
        edgecolors="red",
        linewidths=1.5,
    )
    axes.set(xlabel="head", ylabel="layer", title=plain_name(head_set.name))
    _save(figure, path)


def plot_head_counts(curve: Mapping[int, float], others: Mapping[str, float], path: Path) -> None:
    """Draw nDCG@10 over the number of heads.

    Args:
        curve: Value by number of heads.
        others: Value of other methods by name, drawn as horizontal lines.
        path: The file.
    """
    figure, axes = _figure()
    counts = sorted(curve)
    axes.plot(counts, [curve[count] for count in counts], marker="o", label="best heads")
    for number, (name, value) in enumerate(others.items(), start=1):
        axes.axhline(value, color=f"C{number}", linestyle="--", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set(xlabel="number of heads", ylabel=f"mean {MAIN_MEASURE}")
    axes.legend()
    _save(figure, path)


def plot_costs(results: Sequence[MethodResult], path: Path) -> None:
    """Draw nDCG@10 over the time of a rerank; the first stage is a dashed line."""
    figure, axes = _figure()
    slowest = max(statistics.median(result.seconds or [0.0]) for result in results)
    for result in results:
        value = result.means[MAIN_MEASURE]
        if result.method.heads is None:
            axes.axhline(value, color="grey", linestyle="--")
            continue
        if not result.seconds:
            continue
        seconds = statistics.median(result.seconds)
        layers = result.method.heads.highest_layer + 1
        axes.scatter(1000 * seconds, value)
        right = seconds > slowest / 2  # The label stays inside the frame.
        axes.annotate(
            f"{result.method.name} ({layers} layers)",
            (1000 * seconds, value),
            (-6 if right else 6, -3),
            textcoords="offset points",
            ha="right" if right else "left",
        )
    axes.set(xlabel="ms per rerank, median", ylabel=f"mean {MAIN_MEASURE}", xlim=(0, None))
    axes.margins(0.1)
    _save(figure, path)


def plot_gains(result: MethodResult, first_stage: MethodResult, path: Path) -> None:
    """Draw gain and loss of nDCG@10 per query against the first stage, sorted."""
    differences = sorted(
        value - baseline
        for value, baseline in zip(result.values(), first_stage.values(), strict=True)
    )
    figure, axes = _figure()
    colours = ["C3" if difference < 0 else "C2" for difference in differences]
    axes.bar(range(len(differences)), differences, color=colours, width=1.0)
    better = sum(difference > 0 for difference in differences)
    worse = sum(difference < 0 for difference in differences)
    axes.set(
        xlabel="queries, sorted",
        ylabel=f"{MAIN_MEASURE} of {result.method.name} minus first stage",
        title=f"{better} better, {worse} worse, {len(differences) - better - worse} equal",
    )
    _save(figure, path)


def plot_reliability(result: MethodResult, path: Path) -> None:
    """Draw the share of relevant candidates over their probability; ideal values are dashed."""
    figure, axes = _figure(width=4.8, height=4.4)
    axes.plot((0, 1), (0, 1), color="grey", linestyle="--")
    axes.plot(
        [part.predicted for part in result.reliability],
        [part.observed for part in result.reliability],
        marker="o",
    )
    for part in result.reliability:
        axes.annotate(
            str(part.candidates), part[:2], (6, -10), textcoords="offset points", fontsize="small"
        )
    error = expected_calibration_error(result.reliability)
    axes.set(
        xlabel="probability, mean of the bin",
        ylabel="share of relevant candidates",
        title=f"{result.method.name}: expected calibration error {error:.3f}",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    _save(figure, path)


def _figure(width: float = 6.4, height: float = 4.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    return figure, figure.add_subplot()


def check_picture(path: Path) -> None:
    """Check that pictures can be written in the format of a file.

    Raises:
        InvalidInputError: They cannot.
    """
    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise InvalidInputError(
            f"cannot write a picture to {path}: the name must end with one of "
            f"{', '.join(f'.{name}' for name in formats)}"
        )


def _save(figure: Figure, path: Path) -> None:
    content = BytesIO()
    figure.savefig(content, format=path.suffix[1:].lower())
    write_atomically(path, content.getvalue())
