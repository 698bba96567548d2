"""`make study`: all that docs/extrapolation.md reports, from nothing: trainings, measurements, and a page of tables.

Started again, it goes on where it was: a finished run is not trained again, a finished cell not measured.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from train import retrieval
from train.__main__ import main as run
from train.context_use import context_use
from train.errors import UserError, command, told_in_one_line
from train.extrapolate import extrapolate
from train.figures import table
from train.files import replacing
from train.measured import in_lengths
from train.retrieval_accuracy import retrieval_accuracy

TEMPERATURES = (0.05, 0.1, 0.2, 0.4)
TAILS = (1.0, 2.0, 4.0, 8.0)
SWEEP_LONGEST = 32  # of temperatures and tails, in trained lengths: as far as the threshold asks
SCALE_LONGEST = 16  # of scale bases
ALREADY_DONE = 0.2  # of its expected time: a step that takes less was done before and says nothing of the speed here

Work = Callable[[], None]


@dataclass(frozen=True)
class Step:
    """A training or a measurement, and about how many minutes it takes on two CPU cores."""

    name: str
    minutes: float
    work: Work


@dataclass(frozen=True)
class Study:
    """Where its configurations and its results are, which seeds it trains with, and on what text."""

    configs: Path
    folder: Path
    seeds: list[int]
    paths: list[str] | None

    @property
    def context_length(self) -> int:
        return yaml.safe_load((self.configs / "data.yaml").read_text())["context_length"]

    @property
    def scale_bases(self) -> list[int]:
        """L/8, L/4, L/2, L, 4 L, and the authors' 512."""
        length = self.context_length
        return sorted({length // 8, length // 4, length // 2, length, 4 * length, 512})

    def _name(self, scale_base: int) -> str:
        return "xpos" if 2 * scale_base == self.context_length else f"scale_base{scale_base}"

    def steps(self) -> Iterator[Step]:
        first = self.seeds[0]
        for seed in self.seeds:
            for name in ("xpos", "rotary"):
                yield Step(f"train {name}, seed {seed}", 3.2, self._training(name, seed))
        for name in ("alibi", "none"):
            yield Step(f"train {name}, seed {first}", 3.2, self._training(name, first))
        for scale_base in self.scale_bases:
            if (name := self._name(scale_base)) != "xpos":
                training = self._training("xpos", first, name, ["--model.scale_base", str(scale_base)])
                yield Step(f"train xpos, scale_base {scale_base}", 3.2, training)
        for seed in self.seeds:
            for name in ("xpos", "rotary"):
                yield Step(f"train {name} on retrieval, seed {seed}", 2.0, self._retrieval_training(name, seed))

        both = self._runs("xpos", "rotary")
        seeds = len(self.seeds)
        yield Step("measure loss", 3.5 * seeds, self._measured("extrapolation", extrapolate, both))
        yield Step(
            "measure ALiBi and no positions",
            1.0,
            self._measured("baselines", extrapolate, self._runs("alibi", "none"), modes=["dense", "BCA"]),
        )
        yield Step(
            "measure NTK and YaRN",
            0.7 * seeds,
            self._measured("rescaled", extrapolate, self._runs("rotary"), modes=["NTK", "YaRN"]),
        )
        for mode, values in (("temperature", TEMPERATURES), ("tail", TAILS)):
            for value in values:
                change: dict[str, Any] = {mode: value, "modes": [mode], "longest": SWEEP_LONGEST}
                measuring = self._measured(f"{mode}{value:g}", extrapolate, self._runs("xpos"), **change)
                yield Step(f"measure {mode} {value:g}", 0.2 * seeds, measuring)
        for scale_base in self.scale_bases:
            measuring = self._measured(
                f"scale_base{scale_base}",
                extrapolate,
                self._runs(f"{self._name(scale_base)}/seed{first}"),
                modes=["dense"],
                longest=SCALE_LONGEST,
            )
            yield Step(f"measure scale_base {scale_base}", 0.3, measuring)
        yield Step("measure the use of context", 1.5 * seeds, self._measured("context_use", context_use, both))
        recall = [str(self.folder / "retrieval")]
        yield Step("measure retrieval", 1.0 * seeds, self._measured("retrieval", retrieval_accuracy, recall))

    def _runs(self, *names: str) -> list[str]:
        return [str(self.folder / name) for name in names]

    def _training(self, config: str, seed: int, name: str | None = None, changes: Iterable[str] = ()) -> Work:
        text = [] if self.paths is None else ["--data.paths", json.dumps(self.paths)]
        return partial(run, [*self._fit(config, seed, self.folder), "--name", name or config, *text, *changes])

    def _retrieval_training(self, config: str, seed: int) -> Work:
        return partial(retrieval.main, self._fit(f"retrieval/{config}", seed, self.folder / "retrieval"))

    def _fit(self, config: str, seed: int, runs: Path) -> list[str]:
        path = str(self.configs / f"{config}.yaml")
        return ["fit", "--config", path, "--seed_everything", str(seed), "--runs", str(runs), "--trainer.devices", "1"]

    def _measured(self, name: str, measure: Callable[..., None], runs: list[str], **options: Any) -> Work:
        def work() -> None:
            with told_in_one_line():
                measure(runs, output=str(self.folder / "measured" / name), **options)

        return work

    def page(self) -> str:
        """The tables that no single measurement has: the sweeps."""
        return "\n".join(
            [
                "# Sweeps",
                "",
                f"L = {self.context_length}. All else is in the folders below `measured`, a report.md in each.",
                "",
                "## Temperature c and soft tail p: loss above that at L, nats a byte",
                "",
                f"xPos, dense, seeds {', '.join(map(str, self.seeds))}.",
                "",
                *self._table(
                    [(f"c = {c:g}", f"temperature{c:g}") for c in TEMPERATURES]
                    + [(f"p = {p:g}", f"tail{p:g}") for p in TAILS],
                    lambda cell: "{:+.3f} [{:+.3f}, {:+.3f}]".format(*cell["against_L"]),
                ),
                "",
                "## scale_base: loss, nats a byte",
                "",
                f"xPos, dense, trained with each, seed {self.seeds[0]}.",
                "",
                *self._table(
                    [(f"scale_base {base}", f"scale_base{base}") for base in self.scale_bases],
                    lambda cell: f"{cell['loss']:.3f}",
                ),
                "",
            ]
        )

    def _table(self, rows: list[tuple[str, str]], entry: Callable[[dict[str, Any]], str]) -> list[str]:
        """A Markdown table with a row for each (head, measurement), from L on."""
        heads, entries = [], []
        for head, name in rows:
            cells = json.loads((self.folder / "measured" / name / "summary.json").read_text())["cells"]
            cells = [cell for cell in cells if cell["context"] >= self.context_length]
            heads = ["context", *(in_lengths(cell["context"], self.context_length) for cell in cells)]
            entries.append([head, *map(entry, cells)])
        return table(heads, entries)


def study(
    configs: str = "configs", output: str = "runs/study", seeds: list[int] | None = None, paths: list[str] | None = None
) -> None:
    """Train and measure everything, and write a page for each measurement.

    Args:
        configs: folder with xpos.yaml, rotary.yaml, alibi.yaml, none.yaml, and the same below retrieval/.
        output: folder for runs and results.
        seeds: of the main matrix and of retrieval; the other trainings have the first of them. By default 1, 2, 3.
        paths: text to train on, as `data.paths` has it; by default the source of Python's standard library.

    Raises:
        UserError: there is no such folder of configurations, or a seed is given twice or none is.
    """
    seeds = [1, 2, 3] if seeds is None else seeds
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds must be different ones, one at least, got {seeds}")
    if not (Path(configs) / "data.yaml").is_file():
        raise UserError(f"configs must be a folder with data.yaml and the configurations, got {configs!r}")
    plan = Study(Path(configs), Path(output), seeds, paths)
    steps = list(plan.steps())
    begun, took, expected = time.monotonic(), 0.0, 0.0
    for i, step in enumerate(steps):
        left = sum(later.minutes for later in steps[i:]) * (took / expected if expected else 1)
        so_far = (time.monotonic() - begun) / 60
        print(f"\n[{i + 1}/{len(steps)}] {step.name}; {so_far:.0f} min so far, about {left:.0f} min left", flush=True)
        start = time.monotonic()
        torch.compiler.reset()  # or the layers of one training count as graphs of another's, whose number is limited
        step.work()
        minutes = (time.monotonic() - start) / 60
        if minutes > ALREADY_DONE * step.minutes:
            took, expected = took + minutes, expected + step.minutes
    with replacing(plan.folder / "sweeps.md") as draft:
        draft.write_text(plan.page())
    print(f"\n{plan.page()}\nThe reports are in {plan.folder / 'measured'}, the sweeps in {plan.folder / 'sweeps.md'}")


def main(args: list[str] | None = None) -> None:
    command(study, args)


if __name__ == "__main__":
    main()
