"""Tables, plots and verdicts of an extrapolation measurement (`train.extrapolate` says what is measured)."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train.files import replacing
from train.measured import Measured, in_lengths, interval
from train.thresholds import Evidence, verdicts

# Of Okabe and Ito: told apart by all eyes.
COLOURS = {"xPos": "#0072B2", "RoPE": "#D55E00", "ALiBi": "#009E73", "no positions": "#CC79A7"}
STYLES = [("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"), ((0, (5, 1, 1, 1)), "v"), ((0, (1, 3)), "P")]


@dataclass(frozen=True)
class Unit:
    """What a token is called, and how many a byte of text has."""

    name: str = "byte"
    tokens_per_byte: float = 1.0


def write_report(
    cells: list[dict[str, Any]],
    documents: list[str],
    contexts: list[int],
    steps: int,
    folder: Path,
    unit: Unit = Unit(),
) -> None:
    """Print the table and the verdicts; write report.md, summary.json and the two plots into the folder."""
    keys = dict.fromkeys((cell["encoding"], cell["mode"]) for cell in cells)
    lines = [Measured([c for c in cells if (c["encoding"], c["mode"]) == key]) for key in keys]
    length = 4 * contexts[0]
    rises = {line.name: rise_over_trained(line, documents, length) for line in lines}
    found = verdicts(Evidence({(line.encoding, line.mode): line for line in lines}, documents, length))
    seeds = sorted({seed for line in lines for seed in line.seeds})
    caption = (
        f"{len(documents)} windows of {len(set(documents))} held-out documents, "
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}; "
        f"trained at L = {length} for {steps} steps; "
        f"the same last {length // 2} {unit.name}s of each window are predicted at every context."
    )

    def table(title: str, entry: Any) -> list[str]:
        return [f"## {title}", "", *markdown(lines, contexts, length, entry), ""]

    main = table(f"Loss, nats a {unit.name}", lambda line, c: f"{line.mean(c):.3f}")
    report = [
        "# Loss against context length",
        "",
        caption,
        "",
        *main,
        *table(
            f"Difference against context L, nats a {unit.name}, with 95 % interval",
            lambda line, c: "{:+.3f} [{:+.3f}, {:+.3f}]".format(*rises[line.name][c]),
        ),
        *table(f"Perplexity a {unit.name}", lambda line, c: f"{math.exp(line.mean(c)):.2f}"),
        *table("Bits a byte", lambda line, c: f"{line.mean(c) / math.log(2) * unit.tokens_per_byte:.3f}"),
        *chunked_table(lines, contexts, length, unit.name),
        "## Thresholds",
        "",
        *(f"- {verdict}" for verdict in found),
        "",
        "Intervals: bootstrap over seeds, then documents."
        + (" With one seed they say nothing about another training." if len(seeds) == 1 else ""),
        "",
        "![loss against context length](extrapolation.png)",
        "",
        "![loss by position](by_position.png)",
        "",
    ]
    with replacing(folder / "report.md") as draft:
        draft.write_text("\n".join(report))
    summary = [
        {
            "encoding": line.encoding,
            "mode": line.mode,
            "context": c,
            "loss": line.mean(c),
            "against_L": rises[line.name][c],
        }
        for line in lines
        for c in contexts
    ]
    with replacing(folder / "summary.json") as draft:
        draft.write_text(json.dumps({"caption": caption, "cells": summary, "thresholds": found}, indent=1))
    plot_contexts(lines, contexts, documents, folder / "extrapolation.png", unit.name)
    plot_positions(lines, length, folder / "by_position.png", unit.name)
    print("\n".join(["", caption, "", *main, *found, ""]))
    print(f"{folder / 'report.md'} has all tables; the plot is {folder / 'extrapolation.png'}")


def rise_over_trained(line: Measured, documents: list[str], length: int) -> dict[int, tuple[float, float, float]]:
    """Mean paired difference of each context's loss against the trained length's, and its interval."""
    differences = {context: losses - line.losses[length] for context, losses in line.losses.items()}
    return {context: (float(d.mean()), *interval(d, documents)) for context, d in differences.items()}


def markdown(lines: list[Measured], contexts: list[int], length: int, entry: Any) -> list[str]:
    heads = ["context", *(in_lengths(context, length) for context in contexts)]
    rows = [[line.name, *(entry(line, context) for context in contexts)] for line in lines]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]

    def row(entries: Iterable[str]) -> str:
        return "| " + " | ".join(e.ljust(w) for e, w in zip(entries, widths, strict=True)) + " |"

    return [row(heads), row("-" * width for width in widths), *map(row, rows)]


def chunked_table(lines: list[Measured], contexts: list[int], length: int, unit: str) -> list[str]:
    """The paper's own measure, for the lines that have it."""
    chunked = [line for line in lines if line.chunked]
    if not chunked:
        return []
    return [
        f"## Perplexity a {unit} of text cut into pieces of each length, as the paper's Table 5 has it",
        "",
        f"Not the same targets at every length: in longer pieces fewer {unit}s are early ones, which have little "
        "context, so this falls with length by itself.",
        "",
        *markdown(chunked, contexts, length, lambda line, c: f"{math.exp(line.chunked[c].mean()):.2f}"),
        "",
    ]


def plot_contexts(lines: list[Measured], contexts: list[int], documents: list[str], path: Path, unit: str) -> None:
    """Loss against context length: a panel for each mode, a line with its 95 % interval for each encoding."""
    length = 4 * contexts[0]
    figure, panels = new_panels(lines, f"Loss of the same {unit}s, by how much context comes before them", length)
    for line in lines:
        axes, losses = panels[line.mode], [line.mean(context) for context in contexts]
        axes.plot(contexts, losses, marker="o", color=colour_of(line), label=line.encoding, **weight(line, 4))
        low, high = zip(*(interval(line.losses[c], documents) for c in contexts), strict=True)
        axes.fill_between(contexts, low, high, color=colour_of(line), alpha=0.15, linewidth=0)
    finish_panels(figure, panels, contexts, length, "context length", path, unit)


def plot_positions(lines: list[Measured], length: int, path: Path, unit: str) -> None:
    """Loss by position in the longest windows, in logarithmic bins, with the level just below L drawn as the floor."""
    figure, panels = new_panels(lines, "Loss by position in the longest window", length)
    for line in lines:
        axes = panels[line.mode]
        centres, losses = logarithmic_bins(line.by_position)
        axes.plot(centres, losses, marker="o", color=colour_of(line), label=line.encoding, **weight(line, 3))
        floor = line.by_position[length // 2 : length].mean()
        axes.axhline(floor, color=colour_of(line), linewidth=0.8, linestyle="--")
    octaves = [length // 2**k for k in (5, 3, 1)] + [length * 2**k for k in (0, 2, 4, 6)]
    ticks = [tick for tick in octaves if 0 < tick <= len(lines[0].by_position)]
    finish_panels(figure, panels, ticks, length, "position (dashed: mean over (L/2, L])", path, unit)


def logarithmic_bins(losses: np.ndarray, bins_per_octave: int = 2) -> tuple[list[float], list[float]]:
    """Geometric centres and means of `losses` (n,), position p being losses[p - 1], in bins of equal ratio."""
    octaves = math.log2(len(losses))
    edges = np.unique(
        np.round(2 ** (np.arange(math.ceil(octaves * bins_per_octave) + 1) / bins_per_octave)).astype(int)
    )
    edges[-1] = len(losses) + 1
    pairs = list(pairwise(edges))
    return [math.sqrt(a * (b - 1)) for a, b in pairs], [float(losses[a - 1 : b - 1].mean()) for a, b in pairs]


def colour_of(line: Measured) -> str:
    return COLOURS.get(line.encoding, "0.4")


def weight(line: Measured, markersize: float) -> dict[str, Any]:
    """RoPE wide and pale below the others, so that lines that coincide are both seen."""
    if line.encoding == "RoPE":
        return {"linewidth": 5, "markersize": 2 * markersize, "alpha": 0.4, "zorder": 2}
    return {"linewidth": 1.5, "markersize": markersize, "alpha": 1.0, "zorder": 3}


def new_panels(lines: list[Measured], title: str, length: int) -> tuple[Figure, dict[str, Axes]]:
    """A figure with a panel for each mode, three a row, on common axes."""
    titles = {line.mode: line.name.removeprefix(f"{line.encoding}, ") for line in lines}
    columns = min(3, len(titles))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(max(6.5, 3.4 * columns), 0.8 + 2.7 * rows), layout="constrained", facecolor="white")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    figure.suptitle(title)
    panels = dict(zip(titles, grid, strict=False))
    for mode, axes in panels.items():
        axes.set_title(titles[mode], fontsize="medium")
        axes.set_xscale("log", base=2)
        axes.axvline(length, color="black", linewidth=1)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid)[len(panels) :]:
        axes.set_visible(False)
    return figure, panels


def finish_panels(
    figure: Figure, panels: dict[str, Axes], ticks: list[int], length: int, label: str, path: Path, unit: str
) -> None:
    first = next(iter(panels.values()))
    first.set_xticks(ticks, [in_lengths(tick, length).replace(" L", "").replace("L", "1", 1) for tick in ticks])
    figure.supxlabel(f"{label}, in trained lengths (vertical line: L = {length} {unit}s)", fontsize="medium")
    figure.supylabel(f"loss, nats a {unit}", fontsize="medium")
    handles: dict[str, Any] = {}
    for axes in panels.values():
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    figure.legend(handles.values(), handles.keys(), frameon=False, loc="outside right upper")
    with replacing(path) as draft:
        figure.savefig(draft, format="png", dpi=150)


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
    with replacing(path) as draft:
        figure.savefig(draft, format="png", dpi=150)
