"""`python -m study`: all that docs/extrapolation.md reports: trainings, measurements, and the pages' tables and plots.

What study/results has is neither trained nor measured again. Interrupted and started again, it goes on where it was.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml

from study import recall
from study.context_use import MODES, measure_context_use
from study.encodings import rescaled_modes
from study.recall import measure_recall
from study.tables import RESULTS, write_documents
from train.__main__ import main as train
from train.errors import UserError, command
from train.extrapolate import measure_loss
from train.measure import read_cells
from train.modes import Mode, standard_modes
from train.runs import Run, find_runs

LOG_N = (0.05, 0.1, 0.2, 0.4)
TAILS = (1.0, 2.0, 4.0, 8.0)


class Training(NamedTuple):
    """What tables call its encoding, its seed, its folder, what trains it, and one option of its kind of data."""

    encoding: str
    seed: int
    folder: Path
    work: Callable[[], None]
    option: str = "paths"


class Measurement(NamedTuple):
    """The results' file, of which trainings, in which modes, and what measures them."""

    name: str
    trainings: list[Training]
    modes: list[Mode]
    work: Callable[[list[Run], list[Mode], Path], Any]


class Study(NamedTuple):
    """Which seeds are trained on what text, of which size, and where."""

    size: str = "cpu"
    runs: Path = Path("runs/study")
    seeds: tuple[int, ...] = (1, 2, 3)
    paths: list[str] | None = None

    def training(self, encoding: str, config: str, seed: int, name: str | None = None, *more: str) -> Training:
        text = () if self.paths is None else ("--data.paths", json.dumps(self.paths))
        options = [*fit_options((self.size, config), name or config, seed, self.runs), *text, *more]
        return Training(encoding, seed, self.runs / (name or config) / f"seed{seed}", partial(train, options))

    def measurements(self) -> list[Measurement]:
        first, length = self.seeds[0], config(self.size)["data"]["context_length"]
        both = ("xPos", "xpos"), ("RoPE", "rotary")
        xpos, rope = ([self.training(*names, seed) for seed in self.seeds] for names in both)
        heads = ("--model.positions.init_args.num_heads", str(config(self.size)["model"]["num_heads"]))
        others = [self.training("ALiBi", "alibi", first, None, *heads), self.training("no positions", "none", first)]
        bases = []
        for base in sorted({length // 8, length // 4, length // 2, length, 4 * length, 512}):  # 512 is the authors'
            option = ("--model.scale_base", str(base))
            own = xpos[0] if 2 * base == length else self.training("", "xpos", first, f"scale_base{base}", *option)
            bases.append(own._replace(encoding=f"scale_base {base}"))

        task, runs, recalls = "recall" if self.size == "cpu" else f"{self.size}_recall", self.runs / "recall", []
        for (encoding, name), seed in product(both, self.seeds):
            work = partial(recall.main, fit_options((task, name), name, seed, runs))
            recalls.append(Training(encoding, seed, runs / name / f"seed{seed}", work, "couples"))

        dense, _, _, bca, *_ = modes = standard_modes(length)
        soft = [standard_modes(length, log_n=c)[1] for c in LOG_N] + [standard_modes(length, tail=p)[2] for p in TAILS]
        used = [mode for mode in modes if mode.name in MODES]
        return [
            Measurement("loss", [*xpos, *rope], modes, measure_loss),
            Measurement("encodings", others, [dense, bca], measure_loss),
            Measurement("encodings", rope, rescaled_modes(length), measure_loss),
            Measurement("softness", xpos, soft, partial(measure_loss, longest=32)),
            Measurement("scale_base", bases, [dense], partial(measure_loss, longest=16)),
            Measurement("context_use", [*xpos, *rope], used, measure_context_use),
            Measurement("recall", recalls, standard_modes(config(task)["data"]["context_length"]), measure_recall),
        ]


def config(name: str) -> dict[str, Any]:
    return yaml.safe_load(Path(f"configs/{name}.yaml").read_text())


def fit_options(configs: tuple[str, ...], name: str, seed: int, runs: Path) -> list[str]:
    files = [argument for each in configs for argument in ("--config", f"configs/{each}.yaml")]
    return ["fit", *files, "--name", name, "--seed_everything", str(seed), "--runs", str(runs), "--trainer.devices=1"]


def study(
    size: Literal["cpu", "gpu"] = "cpu",
    output: str = "runs/study",
    results: str = "study/results",
    seeds: tuple[int, ...] = (1, 2, 3),
    paths: list[str] | None = None,
    only: list[str] | None = None,
) -> None:
    """Train and measure what the results lack, and write the documents' tables and plots.

    Args:
        size: of models, data and trainings: that of configs/cpu.yaml or configs/gpu.yaml.
        output: folder for trainings.
        results: folder for a JSON file a measurement. The documents are made from study/results alone.
        seeds: of the main matrix and of recall; the other trainings have the first of them.
        paths: text to train on, as `data.paths` has it; by default the source of Python's standard library.
        only: measurements to make, such as loss or recall; by default all.

    Raises:
        UserError: a seed is given twice or none is, or there is no such measurement.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds must be different ones, one at least, got {seeds}")
    measurements = Study(size, Path(output), seeds, paths).measurements()
    if unknown := set(only or ()) - {each.name for each in measurements}:
        raise UserError(f"only must name measurements, got {', '.join(unknown)}")
    for each in measurements:
        if only is None or each.name in only:
            complete(each, Path(results) / f"{each.name}.json")
    if Path(results).resolve() == RESULTS:
        write_documents()


def complete(measurement: Measurement, path: Path) -> None:
    """Train and measure what the file at `path` lacks."""
    cells = read_cells(path)[1] if path.exists() else []
    there = {(cell["encoding"], cell["label"], cell["seed"]) for cell in cells}
    missing = [
        training
        for training in measurement.trainings
        if any((training.encoding, mode.label, training.seed) not in there for mode in measurement.modes)
    ]
    for training in missing:
        print(f"\n{measurement.name}: {training.encoding}, seed {training.seed}", flush=True)
        torch.compiler.reset()  # or the layers of one training count as graphs of another's, whose number is limited
        training.work()
    if missing:
        runs = [replace(find_runs([each.folder], each.option)[0], encoding=each.encoding) for each in missing]
        measurement.work(runs, measurement.modes, path)


if __name__ == "__main__":
    command(study)
