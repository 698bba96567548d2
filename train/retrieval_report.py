"""Table, statements and plot of recall by distance (`train.retrieval_accuracy` says what is measured)."""

import math
from pathlib import Path
from statistics import NormalDist
from typing import Any, cast

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train.files import replacing
from train.measured import in_lengths
from train.report import COLOURS, markdown
from train.retrieval import VALUES

CHANCE = 1 / VALUES  # of a guess among the values
OTHER_COLOURS = ("#009E73", "#CC79A7", "#E69F00")  # of encodings without one of their own
MARKERS = "osDv^"


def wilson(right: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (1927): unlike the normal one, it stays in [0, 1] and holds near its ends."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = right / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    low, high = ((centre + sign * spread) / (1 + z * z / count) for sign in (-1, 1))
    return max(0.0, min(low, share)), min(1.0, max(high, share))  # which rounding may push past the share


class Recalled:
    """Right answers of an encoding in a mode at every distance, its seeds pooled."""

    def __init__(self, cells: list[dict[str, Any]], samples: int):
        cells = sorted(cells, key=lambda cell: cell["seed"])
        self.encoding, self.mode, self.label = (cells[0][name] for name in ("encoding", "mode", "label"))
        self.name = f"{self.encoding}, {self.label}"
        self.seeds = [cell["seed"] for cell in cells]
        self.samples = samples
        # JSON turns the distances into strings.
        self.by_seed = [{int(d): right for d, right in cell["right"].items()} for cell in cells]

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
    keys = dict.fromkeys((cell["encoding"], cell["mode"]) for cell in cells)
    lines = [Recalled([c for c in cells if (c["encoding"], c["mode"]) == key], settings.samples) for key in keys]
    length, distances = settings.context_length, settings.distances
    seeds = sorted({seed for line in lines for seed in line.seeds})
    caption = (
        f"Share of right answers by the number of tokens from binding to question; trained at L = {length} for "
        f"{settings.steps} steps; seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}, {settings.samples} "
        f"questions a distance and seed; chance is {100 * CHANCE:.1f} %."
    )

    def table(title: str, entry: Any) -> list[str]:
        head, *rows = markdown(cast(Any, lines), distances, length, entry)
        return [f"## {title}", "", head.replace("context ", "distance", 1), *rows, ""]

    main = table("Accuracy, %", lambda line, d: f"{100 * line.accuracy(d)[0]:.1f}")
    found = statements(lines, reaches, settings)
    report = [
        "# Recall by distance",
        "",
        caption,
        "",
        *main,
        *table("95 % intervals, %", lambda line, d: percent(*line.accuracy(d)[1:])),
        *table("The worst and the best seed, %", lambda line, d: percent(*line.extremes(d))),
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
    modes = {line.mode: line.label for line in lines}
    encodings = list(dict.fromkeys(line.encoding for line in lines))
    columns = min(3, len(modes))
    rows = -(-len(modes) // columns)
    with mpl.rc_context({"font.size": 11}):
        figure = Figure(figsize=(0.6 + 3.8 * columns, 0.9 + 2.9 * rows), layout="constrained", facecolor="white")
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes in panels[len(modes) :]:
        axes.set_visible(False)
    for axes, (mode, label) in zip(panels, modes.items(), strict=False):
        axes.set_title(label)
        for line in lines:
            if line.mode == mode:
                draw(axes, line, encodings.index(line.encoding), settings)
        mark(axes, reaches[mode], settings)
    for axes in panels[max(0, len(modes) - columns) : len(modes)]:
        axes.set_xlabel("distance in trained lengths L")
        axes.tick_params(labelbottom=True)
    for axes in panels[::columns]:
        axes.set_ylabel("right answers, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=len(labels))
    with replacing(path) as draft:
        figure.savefig(draft, format="png", dpi=150)


def draw(axes: Axes, line: Recalled, index: int, settings: Any) -> None:
    """The first encoding in front; the others wide and pale, so that lines that coincide are all seen."""
    shares, lows, highs = zip(*(line.accuracy(d) for d in settings.distances), strict=True)
    front = line.encoding == "xPos" or line.encoding not in COLOURS
    axes.errorbar(
        [d / settings.context_length for d in settings.distances],
        [100 * share for share in shares],
        yerr=[
            [100 * (share - low) for share, low in zip(shares, lows, strict=True)],
            [100 * (high - share) for share, high in zip(shares, highs, strict=True)],
        ],
        color=COLOURS.get(line.encoding, OTHER_COLOURS[index % len(OTHER_COLOURS)]),
        marker=MARKERS[index % len(MARKERS)],
        label=line.encoding,
        capsize=3,
        linewidth=1.5 if front else 4,
        elinewidth=1.2,
        markersize=5 if front else 9,
        alpha=1.0 if front else 0.5,
        zorder=3 if front else 2,
    )


def mark(axes: Axes, reach: int | None, settings: Any) -> None:
    """Chance, the trained length, and how far all layers together reach back."""
    axes.set_xscale("log", base=2)
    ticks = [d / settings.context_length for d in settings.distances]
    axes.set_xticks(ticks, [in_lengths(d, settings.context_length).removesuffix(" L") for d in settings.distances])
    axes.set_ylim(-4, 104)
    axes.axhline(100 * CHANCE, color="0.5", linestyle=":", linewidth=1.5, label="chance")
    axes.axvline(1, color="black", linewidth=1)
    axes.text(1, 0.5, " L", transform=axes.get_xaxis_transform(), ha="left", va="center")
    if reach is not None:
        place = reach / settings.context_length
        axes.axvline(place, color="black", linestyle="--", linewidth=1)
        axes.text(
            place,
            0.62,
            f" all layers reach\n {place:.2f} L",
            transform=axes.get_xaxis_transform(),
            ha="left",
            va="center",
            fontsize=9,
        )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
