"""`python -m study.tables`: every table and plot of docs/extrapolation.md, from study/results/*.json."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns

from study.context_use import FAR, far_table
from study.recall import CHANCE, wilson
from study.recipes import HEADLINE, P_ROPE, PARTIAL, ablations
from study.thresholds import LONG_THRESHOLDS, recall_verdicts, two_looks_verdicts, verdicts
from train.errors import command
from train.extrapolate import loss_table, perplexity_table, rise_table
from train.files import replacing
from train.measure import Results, against, panels, read_cells, results_of, save_plot, table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "study" / "results"
DOCUMENT = ROOT / "docs" / "extrapolation.md"
MARKED = re.compile(r"(?<=<!-- table: )([\w-]+) -->\n.*?(?=<!-- end -->)", re.DOTALL)


def from_length(make: Callable[[Results], str], kind: str | None = None) -> Callable[[Results], str]:
    """The table at L and beyond, of all recipes or those of a kind: headline, qk-norm, hybrid, ablation or other."""

    def is_shown(recipe: str) -> bool:
        of = "ablation" if recipe in ablations(1) else "hybrid" if "layers" in recipe else "other"
        of = "qk-norm" if "QK-norm" in recipe else of
        return kind in (None, "headline" if recipe in HEADLINE else of)

    def some(results: Results) -> str:
        name, at = ("loss", "context") if "loss" in results.tables else ("right", "distance")
        frame = results.tables[name]
        shown = frame[frame["encoding"].map(is_shown) & (frame[at] >= results.length)]
        if shown.empty:
            return "not measured yet"
        label = shown["label"].str.removeprefix("dense").str.removeprefix(", ")
        if "distractors" in shown:
            label = label.where(label == "", label + ", ") + shown["distractors"] + " distractors"
        return make(replace(results, tables={name: shown.assign(label=label)}))

    return some


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


def listed(verdicts: list[str]) -> str:
    return "\n".join(f"- {verdict}" for verdict in verdicts)


# Which file each table is made from, and how.
TABLES: dict[str, tuple[str, Callable[[Results], str]]] = {
    "thresholds": ("loss", lambda results: listed(verdicts(results))),
    "matrix": ("loss", loss_table),
    "paper": ("loss", lambda results: perplexity_table(results, "chunked")),
    "encodings": ("encodings", loss_table),
    "softness": ("softness", from_length(rise_table)),
    "scale-base": ("scale_base", from_length(loss_table)),
    "far": ("context_use", far_table),
    "occurrence": ("context_use", occurrence_table),
    "resolution": ("context_use", resolution_table),
    "recall": ("recall", recall_table),
    "long-thresholds": ("recipes_loss", lambda results: listed(verdicts(results, LONG_THRESHOLDS))),
    "recall-thresholds": ("recipes_recall", lambda results: listed(recall_verdicts(results))),
    "recipes": ("recipes_loss", from_length(loss_table, "headline")),
    "recipes-rise": ("recipes_loss", from_length(rise_table, "headline")),
    "qk-norm": ("recipes_loss", from_length(loss_table, "qk-norm")),
    "qk-norm-rise": ("recipes_loss", from_length(rise_table, "qk-norm")),
    "qk-norm-recall": ("recipes_recall", from_length(recall_by_seed, "qk-norm")),
    "longer": ("longer", from_length(loss_table)),
    "recipes-other": ("recipes_loss", from_length(loss_table, "other")),
    "hybrids": ("recipes_loss", from_length(loss_table, "hybrid")),
    "ablations": ("recipes_loss", from_length(loss_table, "ablation")),
    "recipes-recall": ("recipes_recall", from_length(recall_table, "headline")),
    "recipes-recall-by-seed": ("recipes_recall", from_length(recall_by_seed, "headline")),
    "cosine-recall-by-seed": ("recall_cosine", from_length(recall_by_seed, "headline")),
    "recipes-recall-other": ("recall_cosine", from_length(recall_table, "other")),
    "hybrids-recall": ("recall_cosine", from_length(recall_table, "hybrid")),
    "ablations-recall": ("recall_cosine", from_length(recall_table, "ablation")),
    "two-looks-thresholds": ("two_looks", lambda results: listed(two_looks_verdicts(results))),
    "two-looks": ("two_looks", from_length(recall_by_seed, "headline")),
    "recipes-far": ("recipes_use", far_table),
    "recall-by-seed": ("recall", recall_by_seed),
}


def filled(text: str, folder: Path = RESULTS) -> str:
    """A document with its tables made anew; those whose file is not there yet stay."""

    def replacement(match: re.Match[str]) -> str:
        name, make = TABLES[match[1]]
        path = folder / f"{name}.json"
        made = make(results_of(*read_cells(path))) if path.exists() else "not measured yet"
        return f"{match[1]} -->\n{made}\n"

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


def plot_long(loss: Results, recall: Results) -> sns.FacetGrid:
    """Loss and recall side by side, of RoPE, xPos and what is recommended."""
    on_text, recalled = "loss on text, nats a byte", "recall, right answers in %"
    parts = [
        loss.tables["loss"].assign(x=lambda f: f["context"] / loss.length, y=lambda f: f["loss"], label=on_text),
        recall.tables["right"]
        .query("distractors == 'growing'")
        .assign(x=lambda f: f["distance"] / recall.length, y=lambda f: 100 * f["right"] / f["asked"], label=recalled),
    ]
    frame = pd.concat(parts, ignore_index=True).query("encoding in @HEADLINE[:3] and mode == 'dense' and x <= 64")
    grid = panels(frame, "x", "y", 1, "", facet_kws={"sharey": False}, height=3.2)
    return grid.set_axis_labels("context or distance / L", "")


def plot_attention(use: Results) -> sns.FacetGrid:
    """Where each head attends from the end of the longest window, of one seed: a line a head, a panel a layer."""
    shown = (PARTIAL, P_ROPE, "xPos")
    frame = use.tables["attention"].query(f"encoding in {shown} and seed == seed.min()")
    frame = frame.assign(distance=frame["distance"].clip(lower=0.5) / use.length, share=100 * frame["share"])
    by: dict[str, Any] = {"col": "layer", "row": "encoding", "row_order": shown, "units": "head", "estimator": None}
    grid = sns.relplot(frame, x="distance", y="share", kind="line", color="C0", height=2, aspect=1.4, **by)
    grid.set_titles("{row_name}, layer {col_name}").refline(x=1, color="black", linestyle="-")
    for axes in grid.axes.flat:
        axes.set_xscale("log", base=2)
    return grid.set_axis_labels("distance / L, in octaves", "attention, %")


def lines(name: str, x: str, y: str, ylabel: str) -> Callable[[Results], sns.FacetGrid]:
    """A plot of one of the tables; where the distance is 0, there is none."""
    return lambda results: panels(results.tables[name].query(f"{x} > 0"), x, y, results.length, ylabel)


PLOTS: dict[str, tuple[tuple[str, ...], Callable[..., sns.FacetGrid]]] = {
    "extrapolation": (("loss",), lines("loss", "context", "loss", "loss, nats a byte")),
    "by_position": (("loss",), plot_positions),
    "context_use": (("context_use",), plot_far),
    "occurrence": (("context_use",), lines("occurrence", "distance", "loss", "loss, nats a byte")),
    "resolution": (("context_use",), lines("resolution", "context", "resolution", "attention resolution")),
    "recall": (("recall",), plot_recall),
    "attention": (("recipes_use",), plot_attention),
    "long": (("recipes_loss", "recipes_recall"), plot_long),
}


def write_document() -> None:
    """Write all tables into the document, and all plots beside it."""
    text = filled(DOCUMENT.read_text())
    with replacing(DOCUMENT) as draft:
        draft.write_text(text)
    for plot, (names, make) in PLOTS.items():
        paths = [RESULTS / f"{name}.json" for name in names]
        if all(path.exists() for path in paths):
            save_plot(make(*(results_of(*read_cells(path)) for path in paths)), ROOT / "docs" / f"{plot}.png")


if __name__ == "__main__":
    command(write_document)
