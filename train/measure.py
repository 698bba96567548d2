"""Measurements of trained runs: a cell for each run in each mode, measured once, kept at once, read as DataFrames."""

import json
import math
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from tqdm import tqdm

from train.errors import UserError
from train.files import locked, replacing
from train.modes import Mode
from train.runs import Run, check_comparable

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KEY = ["encoding", "mode", "label", "seed"]  # what a cell is of, in each row of its tables
REPLICATES = 2000


@dataclass(frozen=True)
class Results:
    """With which settings was measured, and what: tidy DataFrames by name, those of cells below each other."""

    settings: dict[str, Any]
    tables: dict[str, Any]  # no DataFrame to the type checker, which follows pandas nowhere

    @property
    def length(self) -> int:
        return self.settings["context_length"]


def results_of(settings: dict[str, Any], cells: Iterable[dict[str, Any]]) -> Results:
    parts: dict[str, list[pd.DataFrame]] = {}
    for cell in cells:
        for name, columns in cell["tables"].items():
            frame = pd.DataFrame({key: cell[key] for key in KEY} | columns)
            if "window" in frame:
                frame["document"] = [settings["documents"][window] for window in frame["window"]]
            parts.setdefault(name, []).append(frame)
    return Results(settings, {name: pd.concat(frames, ignore_index=True) for name, frames in parts.items()})


def read_cells(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        content = json.loads(path.read_text())
        return dict(content["settings"]), list(content["cells"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"output: {path} holds no results, or damaged ones; remove it, or give another") from error


def write_cells(path: Path, settings: dict[str, Any], cells: Iterable[dict[str, Any]]) -> None:
    lines = ",\n".join(json.dumps(cell, separators=(",", ":")) for cell in cells)
    with replacing(path) as draft:
        draft.write_text(f'{{"settings": {json.dumps(settings)},\n"cells": [\n{lines}\n]}}\n')


def measure(
    runs: list[Run],
    modes: list[Mode],
    settings: dict[str, Any],
    path: Path,
    work: Callable[[Run, Mode], dict[str, pd.DataFrame]],
) -> Results:
    """The tables that `work` gives of every run in every mode; what the file at `path` has already is not made again.

    `settings` are what the cells of a file share; where a table has windows, the `documents` of these. Their `notes`
    are added to the file's. A UserError if the file has others, runs are not comparable, or another process writes it.
    """
    check_comparable(runs)
    wanted = {
        (run.encoding, mode.label, run.seed): (run, mode)
        for mode, run in product(modes, runs)
        if mode.takes(run.positions)
    }
    if not wanted:
        names = ", ".join(mode.name for mode in modes)
        raise UserError(f"modes: {names} must fit one of the runs, which keep what they were trained with")
    with locked(path.with_name(f".{path.stem}.lock"), f"output: another process is measuring into {path}; wait for it"):
        there, kept = read_cells(path) if path.exists() else (settings, [])
        if notes := sorted({*there.get("notes", ()), *settings.get("notes", ())}):
            settings, there = settings | {"notes": notes}, there | {"notes": notes}  # of all cells that the file holds
        for name, value in settings.items():
            if there.get(name) != value:
                raise UserError(f"output: {path} has {name} {there.get(name)}, not {value}; remove it, or give another")
        cells = {(cell["encoding"], cell["label"], cell["seed"]): cell for cell in kept}
        missing = [key for key, (run, _) in wanted.items() if cells.get(key, {}).get("checkpoint") != run.sha256]
        for key in tqdm(missing, unit="cell", disable=not missing):
            run, mode = wanted[key]
            tables = {name: rounded(frame) for name, frame in work(run, mode).items()}
            named = dict(zip(KEY, (run.encoding, mode.name, mode.label, run.seed), strict=True))
            cells[key] = named | {"commit": commit(), "checkpoint": run.sha256, "tables": tables}
            write_cells(path, settings, cells.values())
    return results_of(settings, [cells[key] for key in wanted])


def rounded(frame: pd.DataFrame) -> dict[str, list[Any]]:
    """Columns for JSON; a float32 would have all digits of the float64 next to it."""
    return frame.astype(dict.fromkeys(frame.select_dtypes("float32"), "float64")).round(5).to_dict("list")


def commit() -> str | None:
    """Of the code that measures; None outside of a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def against(losses: pd.DataFrame, column: str, value: Any) -> pd.DataFrame:
    """The losses less those of the same model and window where `column` is `value`."""
    same = [*KEY, "window"]
    base = losses[losses[column] == value].set_index(same)["loss"]
    return losses.assign(
        loss=losses["loss"] - base.loc[pd.MultiIndex.from_arrays([losses[k] for k in same])].to_numpy()
    )


def by_window(losses: pd.DataFrame) -> pd.DataFrame:
    """Losses of one encoding in one mode and condition: a row a seed, a column a window."""
    return losses.pivot(index="seed", columns=["document", "window"], values="loss")


class Estimate(NamedTuple):
    """A mean, and its 95 % interval."""

    mean: float
    low: float
    high: float


def estimate(losses: pd.DataFrame) -> Estimate:
    """Of losses or differences `by_window`; the interval is that of a bootstrap over seeds, then documents."""
    values, names = losses.to_numpy(), losses.columns.get_level_values("document")
    documents, member = np.unique(names, return_inverse=True)
    sums, counts = values @ np.eye(len(documents))[member], np.bincount(member)
    rng = np.random.default_rng(0)
    runs = rng.integers(len(values), size=(REPLICATES, len(values), 1))
    chosen = rng.integers(len(documents), size=(REPLICATES, 1, len(documents)))
    means = sums[runs, chosen].sum((1, 2)) / (len(values) * counts[chosen].sum((1, 2)))
    low, high = np.percentile(means, (2.5, 97.5))
    return Estimate(float(values.mean()), float(low), float(high))


def octaves(length: int, longest: int) -> list[int]:
    """L/4, L/2, L, 2 L, ... up to longest * L."""
    return [length * 2**k // 4 for k in range(int(math.log2(longest)) + 3)]


def in_lengths(size: int, length: int) -> str:
    """In trained lengths, such as L/4, L, 2 L."""
    return f"L/{length // size}" if size < length else f"{size // length} L".removeprefix("1 ")


def table(frame: pd.DataFrame, column: str, entry: Callable[[Any], str], length: int | None = None) -> str:
    """Markdown: a row an encoding and mode, a column a value of `column`, in trained lengths if `length` is given."""
    ordered = frame.sort_values("label", key=lambda labels: pd.factorize(labels)[0], kind="stable")
    entries: Any = ordered.groupby(["label", "encoding", column], sort=False).apply(entry)
    rows = entries.unstack(sort=False).fillna("")
    rows.index = [", ".join(filter(None, (encoding, label))) for label, encoding in rows.index]
    if length:
        rows.columns = [in_lengths(size, length) for size in rows.columns]
    return rows.rename_axis(column).to_markdown(disable_numparse=True)


def panels(frame: pd.DataFrame, x: str, y: str, length: int, ylabel: str, **options: Any) -> sns.FacetGrid:
    """A plot with a panel a mode and a line an encoding, x in trained lengths."""
    order = sorted(set(frame["encoding"]))
    columns = 2 if frame["label"].nunique() in (2, 4) else 3
    options = {"col_wrap": columns, "height": 2.7, "errorbar": None, "markers": True} | options
    options |= {"hue": "encoding", "hue_order": order, "style": "encoding", "style_order": order}
    frame = frame.assign(**{x: frame[x] / length})
    grid = sns.relplot(frame, x=x, y=y, kind="line", col="label", palette="colorblind", **options)
    grid.set_titles("{col_name}").set_axis_labels(f"{x} / L", ylabel).refline(x=1, color="black", linestyle="-")
    for axes in grid.axes.flat:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"1/{1 / x:g}" if x < 1 else f"{x:g}")
    return grid


def save_plot(grid: sns.FacetGrid, path: Path) -> None:
    with replacing(path) as draft:
        grid.savefig(draft, format="png", dpi=150)
