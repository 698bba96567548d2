"""How tables and plots look, whichever measurement they are of: a colour an encoding, a panel or a style a mode."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train.files import replacing
from train.measured import Line, in_lengths

L = TypeVar("L", bound=Line)
# Of Okabe and Ito: told apart by all eyes.
COLOURS = {"xPos": "#0072B2", "RoPE": "#D55E00", "ALiBi": "#009E73", "no positions": "#CC79A7"}
STYLES = [("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"), ((0, (5, 1, 1, 1)), "v"), ((0, (1, 3)), "P")]


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table whose columns are aligned."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]

    def row(entries: Iterable[str]) -> str:
        return "| " + " | ".join(e.ljust(w) for e, w in zip(entries, widths, strict=True)) + " |"

    return [row(heads), row("-" * width for width in widths), *map(row, rows)]


def by_length(
    lines: Sequence[L], sizes: list[int], length: int, entry: Callable[[L, int], str], head: str = "context"
) -> list[str]:
    """A table with a row for each line and a column for each size, which is said in trained lengths."""
    heads = [head, *(in_lengths(size, length) for size in sizes)]
    return table(heads, [[line.name, *(entry(line, size) for size in sizes)] for line in lines])


def colour_of(line: Line) -> str:
    return COLOURS.get(line.encoding, "0.4")


def weight(line: Line, markersize: float) -> dict[str, Any]:
    """RoPE wide and pale below the others, so that lines that coincide are both seen."""
    if line.encoding == "RoPE":
        return {"linewidth": 5, "markersize": 2 * markersize, "alpha": 0.4, "zorder": 2}
    return {"linewidth": 1.5, "markersize": markersize, "alpha": 1.0, "zorder": 3}


def new_panels(lines: Sequence[Line]) -> tuple[Figure, dict[str, Axes]]:
    """A figure with a panel for each mode, three a row, four two by two, on common axes."""
    titles = {line.mode: line.label for line in lines}
    columns = 2 if len(titles) == 4 else min(3, len(titles))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(max(6.5, 3.4 * columns), 0.8 + 2.7 * rows), layout="constrained", facecolor="white")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    panels = dict(zip(titles, grid, strict=False))
    for mode, axes in panels.items():
        axes.set_title(titles[mode], fontsize="medium")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[max(0, len(panels) - columns) : len(panels)]:
        axes.tick_params(labelbottom=True)  # also where the panel below is empty
    return figure, panels


def mark_lengths(panels: dict[str, Axes], sizes: list[int], length: int) -> None:
    """Ticks at these sizes, in trained lengths, and a line at one."""
    ticks = [in_lengths(size, length).replace(" L", "").replace("L", "1", 1) for size in sizes]
    for axes in panels.values():
        axes.set_xticks(sizes, ticks)
        axes.axvline(length, color="black", linewidth=1)


def finish_panels(figure: Figure, panels: dict[str, Axes], xlabel: str, ylabel: str, path: Path) -> None:
    """One label an axis and one legend for all panels."""
    figure.supxlabel(xlabel, fontsize="medium")
    figure.supylabel(ylabel, fontsize="medium")
    handles: dict[str, Any] = {}
    for axes in panels.values():
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    figure.legend(handles.values(), handles.keys(), frameon=False, loc="outside right upper")
    save(figure, path)


def new_plot(length: int, title: str, unit: str = "byte") -> tuple[Figure, Axes]:
    with mpl.rc_context({"font.size": 11}):
        figure = Figure(figsize=(9, 5.2), layout="constrained", facecolor="white")
        axes = figure.add_subplot(title=title, ylabel=f"loss, nats a {unit}")
    axes.set_xscale("log", base=2)
    axes.axvline(length, color="black", linewidth=1)
    axes.text(length, 1.0, f" trained length L = {length}", transform=axes.get_xaxis_transform(), va="top")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def finish(figure: Figure, axes: Axes, path: Path) -> None:
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    with replacing(path) as draft:
        figure.savefig(draft, format="png", dpi=150)
