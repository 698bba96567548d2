"""`python -m study.tables`: every table and plot of docs/extrapolation.md and README.md, from study/results/*.json."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import seaborn as sns

from study.context_use import FAR, far_table
from study.recall import CHANCE, wilson
from study.thresholds import verdicts
from train.errors import command
from train.extrapolate import loss_table, perplexity_table, rise_table
from train.files import replacing
from train.measure import Results, against, panels, read_cells, results_of, save_plot, table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "study" / "results"
DOCUMENTS = (ROOT / "docs" / "extrapolation.md", ROOT / "README.md")
MARKED = re.compile(r"(?<=<!-- table: )([\w-]+) -->\n.*?(?=<!-- end -->)", re.DOTALL)


def where(results: Results, query: str) -> Results:
    """The results with some of their losses."""
    return replace(results, tables={"loss": results.tables["loss"].query(query)})


def occurrence_table(results: Results) -> str:
    frame = results.tables["occurrence"]
    first = frame["distance"]
    span = first.astype(str).where(first == 1, first.astype(str) + " to " + (2 * first - 1).astype(str))
    named = frame.assign(back=span.where(first > 0, "never") + " (" + frame["tokens"].astype(str) + ")")
    ordered = named.sort_values("distance", key=lambda d: d.replace(0, d.max() + 1), kind="stable")
    return table(ordered, "back", lambda group: f"{group['loss'].mean():.3f}")


def resolution_table(results: Results) -> str:
    def entry(group: Any) -> str:
        each = group["resolution"]
        return f"{each.mean():.4f} ({each.min():.4f} to {each.max():.4f})"

    return table(results.tables["resolution"], "context", entry, results.length)


def recall_table(results: Results) -> str:
    def entry(group: Any) -> str:
        right, asked = int(group["right"].sum()), int(group["asked"].sum())
        low, high = wilson(right, asked)
        return f"{100 * right / asked:.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    return table(results.tables["right"], "distance", entry, results.length)


def recall_by_seed(results: Results) -> str:
    def entry(group: Any) -> str:
        shares = 100 * group["right"] / group["asked"]
        return f"{shares.min():.1f} to {shares.max():.1f}"

    return table(results.tables["right"], "distance", entry, results.length)


# Which file each table is made from, and how.
TABLES: dict[str, tuple[str, Callable[[Results], str]]] = {
    "thresholds": ("loss", lambda results: "\n".join(f"- {verdict}" for verdict in verdicts(results))),
    "matrix": ("loss", loss_table),
    "soft-and-blockwise": ("loss", lambda results: loss_table(where(results, "mode not in ('sliding', 'recompute')"))),
    "paper": ("loss", lambda results: perplexity_table(results, "chunked")),
    "encodings": ("encodings", loss_table),
    "softness": ("softness", lambda results: rise_table(where(results, f"context >= {results.length}"))),
    "scale-base": ("scale_base", lambda results: loss_table(where(results, f"context >= {results.length}"))),
    "far": ("context_use", far_table),
    "occurrence": ("context_use", occurrence_table),
    "resolution": ("context_use", resolution_table),
    "recall": ("recall", recall_table),
    "recall-by-seed": ("recall", recall_by_seed),
}


def filled(text: str, folder: Path = RESULTS) -> str:
    """A document with its tables made anew; those whose file is not there yet stay."""

    def replacement(match: re.Match[str]) -> str:
        name, make = TABLES[match[1]]
        path = folder / f"{name}.json"
        return f"{match[1]} -->\n{make(results_of(*read_cells(path)))}\n" if path.exists() else match[0]

    return MARKED.sub(replacement, text)


def plot_positions(results: Results) -> sns.FacetGrid:
    """Loss by position; dotted: its mean over (L/2, L]."""
    frame, length = results.tables["by_position"], results.length
    grid = panels(frame, "position", "loss", length, "loss, nats a byte")
    below = frame.query(f"{length / 2} < position <= {length}")
    for (label, _), bins in below.groupby(["label", "encoding"]):
        grid.axes_dict[label].axhline(np.average(bins["loss"], weights=bins["tokens"]), color="0.3", linestyle=":")
    return grid


def plot_far(results: Results) -> sns.FacetGrid:
    """What far text changes, against none."""
    losses: Any = against(results.tables["far"], "far", "absent").query(f"far in {FAR}")
    losses = losses.assign(model=losses["encoding"] + ", " + losses["label"])
    means = losses.groupby(["model", "far"], sort=False, as_index=False)["loss"].mean()
    grid = sns.relplot(means, x="loss", y="model", hue="far", style="far", height=4, aspect=1.8, palette="colorblind")
    for axes in grid.axes.flat:
        axes.set_xscale("symlog", linthresh=0.01)
        axes.axvline(0, color="black", linewidth=1)
    return grid.set_axis_labels("loss with far text less loss without, nats a byte", "")


def plot_recall(results: Results) -> sns.FacetGrid:
    frame = results.tables["right"].assign(share=lambda f: 100 * f["right"] / f["asked"])
    grid = panels(frame, "distance", "share", results.length, "right answers, %")
    return grid.refline(y=100 * CHANCE, color="0.3", linestyle=":")


def lines(name: str, x: str, y: str, ylabel: str) -> Callable[[Results], sns.FacetGrid]:
    """A plot of one of the tables; where the distance is 0, there is none."""
    return lambda results: panels(results.tables[name].query(f"{x} > 0"), x, y, results.length, ylabel)


PLOTS: dict[str, tuple[str, Callable[[Results], sns.FacetGrid]]] = {
    "extrapolation": ("loss", lines("loss", "context", "loss", "loss, nats a byte")),
    "by_position": ("loss", plot_positions),
    "context_use": ("context_use", plot_far),
    "occurrence": ("context_use", lines("occurrence", "distance", "loss", "loss, nats a byte")),
    "resolution": ("context_use", lines("resolution", "context", "resolution", "attention resolution")),
    "recall": ("recall", plot_recall),
}


def write_documents() -> None:
    """Write all tables into the documents, and all plots beside them."""
    for path in DOCUMENTS:
        text = filled(path.read_text())
        with replacing(path) as draft:
            draft.write_text(text)
    for plot, (name, make) in PLOTS.items():
        if (path := RESULTS / f"{name}.json").exists():
            save_plot(make(results_of(*read_cells(path))), ROOT / "docs" / f"{plot}.png")


if __name__ == "__main__":
    command(write_documents)
