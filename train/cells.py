"""Measurements of trained runs: a cell for each run in each mode, measured once, kept at once, gone on with later."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from train.errors import UserError
from train.files import replacing
from train.modes import Mode
from train.runs import Run


def checked_device(device: str, longest: int, least: int, **amounts: float) -> torch.device:
    """The device that is asked for; complains about it, about `longest`, and about amounts that must not be negative.

    Raises:
        UserError: longest is no power of two or below `least`, an amount is negative or infinite, or there is no such
            device.
    """
    if longest < least or longest & (longest - 1):
        above = f" and {least} or above" if least > 1 else ""
        raise UserError(f"longest must be a power of two{above}, got {longest}")
    for name, value in amounts.items():
        if not 0 <= value < math.inf:
            raise UserError(f"{name} must be 0 or above and finite, got {value}")
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device must be auto, cpu or cuda, got {device}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, and there is none here; give auto or cpu")
    use_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    return torch.device("cuda" if use_cuda else "cpu")


def measure_cells(
    runs: list[Run],
    modes: list[Mode],
    settings: Any,
    folder: Path,
    measure: Callable[[Run, Mode, tqdm], dict[str, Any]],
    cost: Callable[[Mode], int],
    **more: Any,
) -> list[dict[str, Any]]:
    """Every run in every mode that fits it, in that order: what `measure` gives, and what it is a measurement of.

    After each, all is written into the folder's results.json, and what is there already is not measured again.

    Args:
        settings: what two measurements must share to be compared, a dataclass.
        measure: a measurement; it reports to the progress bar.
        cost: how much of that it reports.
        more: what else results.json is to hold.

    Raises:
        UserError: the folder holds results with other settings, or a checkpoint other weights than its own.
    """
    cells = [(cell_of(run, mode), run, mode) for mode in modes for run in runs if mode.fits(run.encoding)]
    if not cells:
        names = ", ".join(mode.name for mode in modes)
        raise UserError(f"modes: {names} fit none of the runs; they rescale the angles of RoPE")
    for run in runs:
        run.model(torch.device("cpu"))  # complains before anything is measured
    measured = earlier_cells(folder, settings)
    missing = [entry for entry in cells if key_of(entry[0]) not in measured]
    total = sum(cost(mode) for _, _, mode in missing)
    with tqdm(total=total, unit="B", unit_scale=True, disable=not missing) as progress:
        for cell, run, mode in missing:
            progress.set_description(f"{run.encoding} seed {run.seed}, {mode.label}")
            measured[key_of(cell)] = cell | measure(run, mode, progress)
            with replacing(folder / "results.json") as draft:
                draft.write_text(json.dumps({"settings": asdict(settings), **more, "cells": list(measured.values())}))
    return [measured[key_of(cell)] for cell, _, _ in cells]


def cell_of(run: Run, mode: Mode) -> dict[str, Any]:
    """What a measurement is of."""
    sha256 = hashlib.sha256(run.checkpoint.read_bytes()).hexdigest()
    return {
        "encoding": run.encoding,
        "mode": mode.name,
        "label": mode.label,
        "seed": run.seed,
        "run": str(run.folder),
        "checkpoint_sha256": sha256,
    }


def key_of(cell: dict[str, Any]) -> tuple[str, str]:
    return cell["mode"], cell["checkpoint_sha256"]


def earlier_cells(folder: Path, settings: Any) -> dict[tuple[str, str], dict[str, Any]]:
    """What an earlier call with the same settings, a dataclass, measured in the folder, by its keys.

    Raises:
        UserError: the folder holds results with other settings, or damaged ones.
    """
    path = folder / "results.json"
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text())
        there = dict(results["settings"])
        cells = {key_of(cell): cell for cell in results["cells"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"output: {path} holds no results, or damaged ones; give another --output, or remove it"
        ) from error
    changed = [f"{k} {there.get(k)} there, {v} here" for k, v in asdict(settings).items() if there.get(k) != v]
    if changed:
        raise UserError(
            f"output: {path} has other settings ({'; '.join(changed)}); give another --output, or remove it"
        )
    return cells
