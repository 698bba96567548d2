"""Tables, plots and verdicts of an extrapolation measurement (`train.extrapolate` says what is measured)."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from train.figures import by_length, colour_of, finish_panels, mark_lengths, new_panels, weight
from train.files import replacing
from train.measured import Measured, gathered, interval, on_intervals, seeds_of
from train.thresholds import Evidence, verdicts


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
    lines = gathered(cells, Measured)
    length = 4 * contexts[0]
    rises = {line.name: rise_over_trained(line, documents, length) for line in lines}
    found = verdicts(Evidence({(line.encoding, line.mode): line for line in lines}, documents, length))
    caption = (
        f"{len(documents)} windows of {len(set(documents))} held-out documents, {seeds_of(lines)}; "
        f"trained at L = {length} for {steps} steps; "
        f"the same last {length // 2} {unit.name}s of each window are predicted at every context."
    )

    def section(title: str, entry: Callable[[Measured, int], str]) -> list[str]:
        return [f"## {title}", "", *by_length(lines, contexts, length, entry), ""]

    main = section(f"Loss, nats a {unit.name}", lambda line, c: f"{line.mean(c):.3f}")
    report = [
        "# Loss against context length",
        "",
        caption,
        "",
        *main,
        *section(
            f"Difference against context L, nats a {unit.name}, with 95 % interval",
            lambda line, c: "{:+.3f} [{:+.3f}, {:+.3f}]".format(*rises[line.name][c]),
        ),
        *section(f"Perplexity a {unit.name}", lambda line, c: f"{math.exp(line.mean(c)):.2f}"),
        *section("Bits a byte", lambda line, c: f"{line.mean(c) / math.log(2) * unit.tokens_per_byte:.3f}"),
        *chunked_table(lines, contexts, length, unit.name),
        "## Thresholds",
        "",
        *(f"- {verdict}" for verdict in found),
        "",
        on_intervals(lines),
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
        *by_length(chunked, contexts, length, lambda line, c: f"{math.exp(line.chunked[c].mean()):.2f}"),
        "",
    ]


def plot_contexts(lines: list[Measured], contexts: list[int], documents: list[str], path: Path, unit: str) -> None:
    """Loss against context length: a panel for each mode, a line with its 95 % interval for each encoding."""
    length = 4 * contexts[0]
    figure, panels = new_panels(lines)
    figure.suptitle(f"Loss of the same {unit}s, by how much context comes before them")
    for line in lines:
        axes, losses = panels[line.mode], [line.mean(context) for context in contexts]
        axes.plot(contexts, losses, marker="o", color=colour_of(line), label=line.encoding, **weight(line, 4))
        low, high = zip(*(interval(line.losses[c], documents) for c in contexts), strict=True)
        axes.fill_between(contexts, low, high, color=colour_of(line), alpha=0.15, linewidth=0)
    mark_lengths(panels, contexts, length)
    finish_panels(
        figure, panels, in_trained("context length (bands: 95 % intervals)", length, unit), f"loss, nats a {unit}", path
    )


def plot_positions(lines: list[Measured], length: int, path: Path, unit: str) -> None:
    """Loss by position in the longest windows, in logarithmic bins, with the level just below L drawn as the floor."""
    figure, panels = new_panels(lines)
    figure.suptitle("Loss by position in the longest window")
    for line in lines:
        axes = panels[line.mode]
        centres, losses = logarithmic_bins(line.by_position)
        axes.plot(centres, losses, marker="o", color=colour_of(line), label=line.encoding, **weight(line, 3))
        floor = line.by_position[length // 2 : length].mean()
        axes.axhline(floor, color=colour_of(line), linewidth=0.8, linestyle="--")
    powers = [length // 2**k for k in (5, 3, 1)] + [length * 2**k for k in (0, 2, 4, 6)]
    mark_lengths(panels, [power for power in powers if 0 < power <= len(lines[0].by_position)], length)
    label = in_trained("position (dashed: mean over (L/2, L])", length, unit)
    finish_panels(figure, panels, label, f"loss, nats a {unit}", path)


def in_trained(what: str, length: int, unit: str) -> str:
    return f"{what}, in trained lengths (vertical line: L = {length} {unit}s)"


def logarithmic_bins(losses: np.ndarray, bins_per_octave: int = 2) -> tuple[list[float], list[float]]:
    """Geometric centres and means of `losses` (n,), position p being losses[p - 1], in bins of equal ratio."""
    octaves = math.log2(len(losses))
    edges = np.unique(
        np.round(2 ** (np.arange(math.ceil(octaves * bins_per_octave) + 1) / bins_per_octave)).astype(int)
    )
    edges[-1] = len(losses) + 1
    pairs = list(pairwise(edges))
    return [math.sqrt(a * (b - 1)) for a, b in pairs], [float(losses[a - 1 : b - 1].mean()) for a, b in pairs]
