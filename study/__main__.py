"""`python -m study`: all that docs/extrapolation.md reports: trainings, measurements, and the pages' tables and plots.

What study/results has is neither trained nor measured again. Interrupted and started again, it goes on where it was.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
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
    """Which seeds are trained on what text, with which configurations, and where."""

    size: str = "cpu"
    runs: Path = Path("runs/study")
    seeds: tuple[int, ...] = (1, 2, 3)
    paths: list[str] | None = None
    configs: Path = Path("configs")

    @property
    def recall_size(self) -> str:
        return "recall" if self.size == "cpu" else f"{self.size}_recall"

    def config(self, name: str) -> dict[str, Any]:
        return yaml.safe_load((self.configs / f"{name}.yaml").read_text())

    def training(
        self, encoding: str, name: str, seed: int, run: str | None = None, more: tuple[str, ...] = ()
    ) -> Training:
        text = () if self.paths is None else ("--data.paths", json.dumps(self.paths))
        options = [*self._fit(self.size, name, seed, self.runs), "--name", run or name, *text, *more]
        return Training(encoding, seed, self.runs / (run or name) / f"seed{seed}", partial(train, options))

    def recall_training(self, encoding: str, name: str, seed: int) -> Training:
        runs = self.runs / "recall"
        work = partial(recall.main, self._fit(self.recall_size, name, seed, runs))
        return Training(encoding, seed, runs / name / f"seed{seed}", work, "couples")

    def _fit(self, size: str, name: str, seed: int, runs: Path) -> list[str]:
        configs = [argument for each in (size, name) for argument in ("--config", str(self.configs / f"{each}.yaml"))]
        return ["fit", *configs, "--seed_everything", str(seed), "--runs", str(runs), "--trainer.devices", "1"]

    def measurements(self) -> list[Measurement]:
        sizes, first = self.config(self.size), self.seeds[0]
        length = sizes["data"]["context_length"]
        xpos, rope = ([self.training(e, n, s) for s in self.seeds] for e, n in (("xPos", "xpos"), ("RoPE", "rotary")))
        heads = ("--model.positions.init_args.num_heads", str(sizes["model"]["num_heads"]))
        others = [
            self.training("ALiBi", "alibi", first, more=heads),
            self.training("no positions", "none", first),
        ]
        bases = sorted({length // 8, length // 4, length // 2, length, 4 * length, 512})  # half of L; the authors' 512
        of_bases = [
            self.training(f"scale_base {base}", "xpos", first, f"scale_base{base}", ("--model.scale_base", str(base)))
            if 2 * base != length
            else xpos[0]._replace(encoding=f"scale_base {base}")
            for base in bases
        ]
        recalls = [
            self.recall_training(*pair, seed) for pair in (("RoPE", "rotary"), ("xPos", "xpos")) for seed in self.seeds
        ]
        modes = standard_modes(length)
        dense, log_n, tail, bca, *_ = modes
        soft = [standard_modes(length, log_n=c)[modes.index(log_n)] for c in LOG_N]
        soft += [standard_modes(length, tail=p)[modes.index(tail)] for p in TAILS]
        recall_modes = standard_modes(self.config(self.recall_size)["data"]["context_length"])
        return [
            Measurement("loss", [*xpos, *rope], modes, measure_loss),
            Measurement("encodings", others, [dense, bca], measure_loss),
            Measurement("encodings", rope, rescaled_modes(length), measure_loss),
            Measurement("softness", xpos, soft, partial(measure_loss, longest=32)),
            Measurement("scale_base", of_bases, [dense], partial(measure_loss, longest=16)),
            Measurement("context_use", [*xpos, *rope], [m for m in modes if m.name in MODES], measure_context_use),
            Measurement("recall", recalls, recall_modes, measure_recall),
        ]


def study(
    size: Literal["cpu", "gpu"] = "cpu",
    output: str = "runs/study",
    results: str = str(RESULTS),
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


def main(args: list[str] | None = None) -> None:
    command(study, args)


if __name__ == "__main__":
    main()
