"""Table, statements and plot of recall by distance (`train.retrieval_accuracy` says what is measured)."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from train.figures import by_length, colour_of, finish_panels, mark_lengths, new_panels, weight
from train.files import replacing
from train.measured import Line, gathered, seeds_of
from train.retrieval import VALUES

CHANCE = 1 / VALUES  # of a guess among the values


def wilson(right: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (1927): unlike the normal one, it stays in [0, 1] and holds near its ends."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = right / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    low, high = ((centre + sign * spread) / (1 + z * z / count) for sign in (-1, 1))
    return max(0.0, min(low, share)), min(1.0, max(high, share))  # which rounding may push past the share


class Recalled(Line):
    """Right answers of an encoding in a mode at every distance, its seeds pooled."""

    def __init__(self, cells: list[dict[str, Any]], samples: int):
        super().__init__(cells)
        self.samples = samples
        # JSON turns the distances into strings.
        self.by_seed = [{int(d): right for d, right in cell["right"].items()} for cell in self.cells]

    def pooled(self, *distances: int) -> tuple[int, int]:
        """Right answers, and how many there could be."""
        right = sum(seed[distance] for seed in self.by_seed for distance in distances)
        return right, self.samples * len(self.by_seed) * len(distances)

    def accuracy(self, *distances: int) -> tuple[float, float, float]:
        """Share of right answers at the distances together, and its interval."""
        right, count = self.pooled(*distances)
        return right / count, *wilson(right, count)

    def extremes(self, distance: int) -> tuple[float, float]:
        """The worst and the best seed's accuracy."""
        shares = [seed[distance] / self.samples for seed in self.by_seed]
        return min(shares), max(shares)


def write_report(cells: list[dict[str, Any]], reaches: dict[str, int | None], settings: Any, folder: Path) -> None:
    """Print the table and the statements; write report.md and retrieval.png into the folder.

    reaches: the most tokens that each mode can bring to a question through all layers, None where there is no bound.
    """
    lines = gathered(cells, partial(Recalled, samples=settings.samples))
    length, distances = settings.context_length, settings.distances
    caption = (
        f"Share of right answers by the number of tokens from binding to question; trained at L = {length} for "
        f"{settings.steps} steps; {seeds_of(lines)}, {settings.samples} "
        f"questions a distance and seed; chance is {100 * CHANCE:.1f} %."
    )

    def section(title: str, entry: Callable[[Recalled, int], str]) -> list[str]:
        return [f"## {title}", "", *by_length(lines, distances, length, entry, "distance"), ""]

    main = section("Accuracy, %", lambda line, d: f"{100 * line.accuracy(d)[0]:.1f}")
    found = statements(lines, reaches, settings)
    report = [
        "# Recall by distance",
        "",
        caption,
        "",
        *main,
        *section("95 % intervals, %", lambda line, d: percent(*line.accuracy(d)[1:])),
        *section("The worst and the best seed, %", lambda line, d: percent(*line.extremes(d))),
        "## What it shows",
        "",
        f"Blockwise, one layer sees {length // 2} to {length} tokens, by the question's place in its block. All layers "
        "together reach farther, as the plot shows; whether a model makes use of that is another matter, for none was "
        "trained to hand a binding on from layer to layer. Out of reach, no model can do better than chance.",
        "",
        *(f"- {statement}" for statement in found),
        "",
        "Intervals are Wilson's, of all seeds' answers together: they hold for other questions to these models, and "
        "say nothing about another training.",
        "",
        "![accuracy against distance](retrieval.png)",
        "",
    ]
    with replacing(folder / "report.md") as draft:
        draft.write_text("\n".join(report))
    plot(lines, reaches, settings, folder / "retrieval.png")
    print("\n".join(["", caption, "", *main, *found, ""]))
    print(f"{folder / 'report.md'} has the intervals; the plot is {folder / 'retrieval.png'}")


def percent(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f}"


def statements(lines: list[Recalled], reaches: dict[str, int | None], settings: Any) -> list[str]:
    """For each line: recall within the trained length, beyond it but within reach of all layers, and beyond that."""
    length, found = settings.context_length, []
    for line in lines:
        reach = reaches[line.mode]
        bound = math.inf if reach is None else reach
        parts = {
            "up to L": [d for d in settings.distances if d <= length],
            "beyond L": [d for d in settings.distances if length < d <= bound],
            f"out of reach, beyond {bound / length:.3g} L": [d for d in settings.distances if d > bound],
        }
        told = []
        for where, distances in parts.items():
            if distances:
                share, low, high = line.accuracy(*distances)
                verdict = ""
                if distances[0] > bound:
                    verdict = ", which is chance" if low <= CHANCE <= high else ", which is NOT chance"
                told.append(f"{where} {100 * share:.1f} % [{percent(low, high)}]{verdict}")
        found.append(f"{line.name}: {'; '.join(told)}")
    return found


def plot(lines: list[Recalled], reaches: dict[str, int | None], settings: Any, path: Path) -> None:
    """A panel for each mode: accuracy and its interval against distance, a line for each encoding."""
    figure, panels = new_panels(lines)
    figure.suptitle("Recall, by how far back lies what is recalled")
    length = settings.context_length
    mark_lengths(panels, settings.distances, length)
    for line in lines:
        shares, lows, highs = 100 * np.array([line.accuracy(d) for d in settings.distances]).T
        errors = (shares - lows, highs - shares)
        look = {"color": colour_of(line), "marker": "o", "capsize": 3, "elinewidth": 1.2} | weight(line, 5)
        panels[line.mode].errorbar(settings.distances, shares, yerr=errors, label=line.encoding, **look)
    for mode, axes in panels.items():
        axes.set_ylim(-4, 104)
        axes.axhline(100 * CHANCE, color="0.5", linestyle=":", linewidth=1.5, label="chance")
        if (reach := reaches[mode]) is not None:
            axes.axvline(reach, color="black", linestyle="--", linewidth=1)
            words = f"dashed: all layers\nreach {reach / length:.2f} L"
            axes.text(0.98, 0.75, words, transform=axes.transAxes, ha="right", va="center", fontsize=9)
    label = f"distance (bars: 95 % intervals), in trained lengths (vertical line: L = {length} tokens)"
    finish_panels(figure, panels, label, "right answers, %", path)
