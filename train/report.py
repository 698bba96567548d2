"""Tables, plots and verdicts of an extrapolation measurement (`train.extrapolate` says what is measured)."""

import json
import math
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train.files import replacing

REPLICATES = 2000
COLOURS = {"xPos": "#0072B2", "RoPE": "#D55E00"}  # of Okabe and Ito: told apart by all eyes
STYLES = [("-", "o"), ("--", "s"), (":", "^"), ("-.", "D")]


class Measured:
    """Losses of an encoding in a mode: (runs, windows) at every context, and at every position of the longest."""

    def __init__(self, cells: list[dict[str, Any]]):
        cells = sorted(cells, key=lambda cell: cell["seed"])  # so that two encodings' runs pair up
        self.encoding, self.mode = cells[0]["encoding"], cells[0]["mode"]
        self.name = f"{self.encoding}, {cells[0]['label']}"
        self.seeds = [cell["seed"] for cell in cells]
        # JSON turns the contexts into strings.
        self.losses = {
            int(context): np.array([{int(k): v for k, v in cell["losses"].items()}[int(context)] for cell in cells])
            for context in cells[0]["losses"]
        }
        self.by_position = np.array([cell["by_position"] for cell in cells]).mean(0)

    def mean(self, context: int) -> float:
        return float(self.losses[context].mean())


def interval(differences: np.ndarray, documents: list[str]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of `differences` (runs, windows): resamples runs, then whole documents."""
    names = sorted(set(documents))
    member = np.array([[name == document for document in documents] for name in names], dtype=float)
    sums, counts = differences @ member.T, member.sum(1)
    rng = np.random.default_rng(0)
    runs = rng.integers(len(differences), size=(REPLICATES, len(differences), 1))
    chosen = rng.integers(len(names), size=(REPLICATES, 1, len(names)))
    means = sums[runs, chosen].sum((1, 2)) / (len(differences) * counts[chosen].sum((1, 2)))
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def write_report(
    cells: list[dict[str, Any]], documents: list[str], contexts: list[int], steps: int, folder: Path
) -> None:
    """Print the table and the verdicts; write report.md, summary.json and the two plots into the folder."""
    keys = dict.fromkeys((cell["encoding"], cell["mode"]) for cell in cells)
    lines = [Measured([c for c in cells if (c["encoding"], c["mode"]) == key]) for key in keys]
    length = 4 * contexts[0]
    rises = {line.name: rise_over_trained(line, documents, length) for line in lines}
    found = verdicts({(line.encoding, line.mode): line for line in lines}, rises, documents, length)
    seeds = sorted({seed for line in lines for seed in line.seeds})
    caption = (
        f"{len(documents)} windows of {len(set(documents))} held-out documents, "
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}; "
        f"trained at L = {length} for {steps} steps; "
        f"the same last {length // 2} bytes of each window are predicted at every context."
    )

    def table(title: str, entry: Any) -> list[str]:
        return [f"## {title}", "", *markdown(lines, contexts, length, entry), ""]

    main = table("Loss, nats a byte", lambda line, c: f"{line.mean(c):.3f}")
    report = [
        "# Loss against context length",
        "",
        caption,
        "",
        *main,
        *table(
            "Difference against context L, nats a byte, with 95 % interval",
            lambda line, c: "{:+.3f} [{:+.3f}, {:+.3f}]".format(*rises[line.name][c]),
        ),
        *table("Perplexity a byte", lambda line, c: f"{math.exp(line.mean(c)):.2f}"),
        *table("Bits a byte", lambda line, c: f"{line.mean(c) / math.log(2):.3f}"),
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
    plot_contexts(lines, contexts, length, folder / "extrapolation.png")
    plot_positions(lines, length, folder / "by_position.png")
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


def in_lengths(context: int, length: int) -> str:
    if context >= length:
        return f"{context // length} L" if context > length else "L"
    return f"L/{length // context}"


def verdicts(
    lines: dict[tuple[str, str], Measured],
    rises: dict[str, dict[int, tuple[float, float, float]]],
    documents: list[str],
    length: int,
) -> list[str]:
    """Every threshold of the protocol: met or missed with its figure, or why it is not measured."""

    def lacking(reach: int, *keys: tuple[str, str]) -> str:
        """Why something that is asked of lines at `reach` trained lengths cannot be told; nothing if it can."""
        for encoding, mode in keys:
            if (encoding, mode) not in lines:
                return f"{encoding} {mode} is not in this matrix"
            if reach * length > (longest := max(lines[encoding, mode].losses)):
                return f"contexts end at {in_lengths(longest, length)}"
        return ""

    def rise(encoding: str, mode: str) -> dict[int, tuple[float, float, float]]:
        return rises[lines[encoding, mode].name]

    found = []

    def verdict(met: bool, claim: str, figure: str) -> None:
        found.append(f"{'met' if met else 'MISSED'}: {claim}: {figure}")

    def not_measured(claim: str, why: str) -> None:
        found.append(f"not measured: {claim}: {why}")

    claim = "collapse, RoPE dense at 4 L is at least 1 nat above L"
    if why := lacking(4, ("RoPE", "dense")):
        not_measured(claim, why)
    else:
        figure = rise("RoPE", "dense")[4 * length][0]
        verdict(figure >= 1, claim, f"{figure:+.3f}")

    claim = "xPos dense at 2 L is within 0.05 nats of L"
    if why := lacking(2, ("xPos", "dense")):
        not_measured(claim, why)
    else:
        figure = rise("xPos", "dense")[2 * length][0]
        verdict(figure <= 0.05, claim, f"{figure:+.3f}")

    claim = "flat, xPos BCA is within +0.02 nats of L up to 64 L (upper end of the interval)"
    if why := lacking(2, ("xPos", "BCA")):
        not_measured(claim, why)
    else:
        flat = rise("xPos", "BCA")
        upper, context = max((flat[c][2], c) for c in flat if length < c <= 64 * length)
        figure = f"at most {upper:+.4f}, at {in_lengths(context, length)}"
        if upper <= 0.02 and (why := lacking(64, ("xPos", "BCA"))):
            not_measured(claim, f"{why}, there {figure}")
        else:
            verdict(upper <= 0.02, claim, figure)

    claim = "open context, with temperature xPos dense is within 0.1 nats of L up to 32 L, where RoPE is above 1 nat"
    warm = ("xPos", "temperature"), ("RoPE", "temperature")
    if why := lacking(2, *warm):
        not_measured(claim, why)
    else:
        xpos, rope = (rise(*key) for key in warm)
        reached = [c for c in xpos if length < c <= 32 * length]
        worst, there = max(xpos[c][0] for c in reached), rope[max(reached)][0]
        figure = f"xPos at most {worst:+.3f}, RoPE {there:+.3f}"
        if worst <= 0.1 and (why := lacking(32, *warm)):
            not_measured(claim, f"{why}, there {figure}")
        else:
            verdict(worst <= 0.1 and there > 1, claim, figure)

    claim = "fair win, from L to 4 L xPos BCA rises more than RoPE BCA by"
    blockwise = ("xPos", "BCA"), ("RoPE", "BCA")
    if why := lacking(4, *blockwise):
        not_measured(claim, why)
    elif lines[blockwise[0]].seeds != lines[blockwise[1]].seeds:
        not_measured(claim, "the two have other seeds")
    else:
        grown = [lines[key].losses[4 * length] - lines[key].losses[length] for key in blockwise]
        difference = grown[0] - grown[1]
        low, high = interval(difference, documents)
        found.append(
            f"reported, whichever way it falls: {claim} {difference.mean():+.4f} [{low:+.4f}, {high:+.4f}] nats"
        )

    not_measured(
        "no worse than recompute, xPos BCA is within 0.01 nats of recomputing the last L at a stride of L/2",
        "recompute is not in this matrix",
    )
    return found


def plot_contexts(lines: list[Measured], contexts: list[int], length: int, path: Path) -> None:
    """Loss against context length, a line for each encoding and mode."""
    figure, axes = new_plot(length, "Loss of the same bytes, by how much context comes before them")
    for line, (colour, style, marker) in zip(lines, looks(lines), strict=True):
        losses = [line.mean(context) for context in contexts]
        axes.plot(contexts, losses, style, color=colour, marker=marker, label=line.name, **weight(line, 5))
    axes.set_xlabel("context length, bytes (log scale)")
    axes.set_xticks(contexts, [str(context) for context in contexts])
    finish(figure, axes, path)


def plot_positions(lines: list[Measured], length: int, path: Path) -> None:
    """Loss by position in the longest windows, in logarithmic bins, with the level just below L drawn as the floor."""
    figure, axes = new_plot(length, "Loss by position in the longest window")
    for line, (colour, style, marker) in zip(lines, looks(lines), strict=True):
        centres, losses = logarithmic_bins(line.by_position)
        axes.plot(centres, losses, style, color=colour, marker=marker, label=line.name, **weight(line, 3))
    dense = next((line for line in lines if (line.encoding, line.mode) == ("xPos", "dense")), lines[0])
    floor = dense.by_position[length // 2 : length].mean()
    axes.axhline(floor, color="0.5", linewidth=1, label=f"{dense.name}: mean over (L/2, L]")
    axes.set_xlabel("position, bytes (log scale)")
    finish(figure, axes, path)


def logarithmic_bins(losses: np.ndarray, bins_per_octave: int = 2) -> tuple[list[float], list[float]]:
    """Geometric centres and means of `losses` (n,), position p being losses[p - 1], in bins of equal ratio."""
    octaves = math.log2(len(losses))
    edges = np.unique(
        np.round(2 ** (np.arange(math.ceil(octaves * bins_per_octave) + 1) / bins_per_octave)).astype(int)
    )
    edges[-1] = len(losses) + 1
    pairs = list(pairwise(edges))
    return [math.sqrt(a * (b - 1)) for a, b in pairs], [float(losses[a - 1 : b - 1].mean()) for a, b in pairs]


def looks(lines: list[Measured]) -> list[tuple[str, str, str]]:
    """Colour by encoding, line style and marker by mode."""
    modes = list(dict.fromkeys(line.mode for line in lines))
    return [(COLOURS.get(line.encoding, "#009E73"), *STYLES[modes.index(line.mode) % len(STYLES)]) for line in lines]


def weight(line: Measured, markersize: float) -> dict[str, Any]:
    """RoPE wide and pale below the others, so that lines that coincide are both seen."""
    if line.encoding == "RoPE":
        return {"linewidth": 5, "markersize": 2 * markersize, "alpha": 0.4, "zorder": 2}
    return {"linewidth": 1.5, "markersize": markersize, "alpha": 1.0, "zorder": 3}


def new_plot(length: int, title: str) -> tuple[Figure, Axes]:
    with mpl.rc_context({"font.size": 11}):
        figure = Figure(figsize=(9, 5.2), layout="constrained", facecolor="white")
        axes = figure.add_subplot(title=title, ylabel="loss, nats a byte")
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
