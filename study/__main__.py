"""`python -m study`: all that docs/extrapolation.md reports: trainings, measurements, and the pages' tables and plots.

What study/results has is neither trained nor measured again. Interrupted and started again, it goes on where it was.
"""

import json
import re
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
from study.recall import DISTRACTORS, measure_recall
from study.recipes import DISCOUNT, HEADLINE, PARTIAL, Options, ablations, hybrids, recipes, with_qk_norm
from study.tables import RESULTS, write_document
from train.__main__ import main as train
from train.errors import UserError, command
from train.extrapolate import measure_loss
from train.measure import read_cells
from train.modes import Mode, discounted, standard_modes
from train.runs import Run, find_runs

LOG_N = (0.05, 0.1, 0.2, 0.4)
TAILS = (1.0, 2.0, 4.0, 8.0)
COSINE: Options = {"schedule": "cosine"}  # of the learning rate, which in configs/recall.yaml stays high
TWO_LOOKS: Options = {"data.looks": 2, "trainer.max_steps": 5000}  # learned late, and all of a sudden


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
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    paths: list[str] | None = None

    def trainings(
        self, recipes: dict[str, Options], seeds: tuple[int, ...], task: str = "", kind: str = "", **more: Any
    ) -> list[Training]:
        """Of all recipes, for each seed in turn, on text or on a task of its own; of another kind with more options."""
        size = "recall" if task and self.size == "cpu" else f"{self.size}_{task}" if task else self.size
        runs, fit, found = self.runs / kind / task, recall.main if task else train, []
        for seed, (encoding, options) in product(seeds, recipes.items()):
            name = re.sub(r"\W+", "_", encoding).strip("_").lower()
            arguments = ["fit", "--config", f"configs/{size}.yaml", "--name", name, "--seed_everything", str(seed)]
            arguments += ["--runs", str(runs), "--trainer.devices=1"]
            named = {key if "." in key else f"model.{key}": value for key, value in (options | more).items()}
            arguments += [f"--{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in named.items()]
            arguments += [] if task or self.paths is None else ["--data.paths", json.dumps(self.paths)]
            folder, option = runs / name / f"seed{seed}", "couples" if task else "paths"
            found.append(Training(encoding, seed, folder, partial(fit, arguments), option))
        return found

    def measurements(self) -> list[Measurement]:
        seeds, first = self.seeds, self.seeds[:1]
        task_size = "recall" if self.size == "cpu" else f"{self.size}_recall"
        (length, *sizes), (task_length, *task_sizes) = map(sizes_of, (self.size, task_size))
        on_text = recipes(length, sizes[0]) | hybrids(length, *sizes) | ablations(length)
        on_task = recipes(task_length, task_sizes[0]) | hybrids(task_length, *task_sizes) | ablations(task_length)

        def text(*names: str, seeds: tuple[int, ...] = seeds) -> list[Training]:
            return self.trainings({name: on_text[name] for name in names}, seeds)

        def task(kind: str, *names: str, seeds: tuple[int, ...] = seeds, **more: Any) -> list[Training]:
            return self.trainings({name: on_task[name] for name in names}, seeds, "recall", kind, **more)

        others, others_asked = ([name for name in known if name not in HEADLINE] for known in (on_text, on_task))
        *normed, based = with_qk_norm(length, sizes[0])
        on_text |= with_qk_norm(length, sizes[0])
        on_task |= with_qk_norm(task_length, task_sizes[0])
        bases = sorted({length // 8, length // 4, length, 4 * length, 512})  # 512 is the authors'
        other = {f"scale_base {base}": {**on_text["xPos"], "scale_base": base} for base in bases}
        scaled = [text("xPos")[0]._replace(encoding=f"scale_base {length // 2}"), *self.trainings(other, first)]
        scaled.sort(key=lambda training: int(training.encoding.split()[1]))
        batch_size = config(self.size)["data"]["batch_size"]
        trained_longer = {"data.context_length": 2 * length, "data.batch_size": batch_size // 2}  # as many tokens
        ours = {PARTIAL: recipes(2 * length, sizes[0])[PARTIAL]}
        longer = self.trainings(ours, first, kind="longer", **trained_longer)

        modes, task_modes = standard_modes(length), standard_modes(task_length)
        dense, _, _, bca, *_ = modes
        soft = [standard_modes(length, log_n=c)[1] for c in LOG_N] + [standard_modes(length, tail=p)[2] for p in TAILS]
        used = [mode for mode in modes if mode.name in MODES]
        discount, task_discount = (discounted(each, DISCOUNT) for each in (length, task_length))
        far = partial(measure_recall, longest=128, distractors=DISTRACTORS)
        twice = partial(far, longest=32)
        return [
            Measurement("loss", text("xPos", "RoPE", seeds=seeds[:3]), modes, measure_loss),
            Measurement("encodings", text("ALiBi", "no positions", seeds=first), [dense, bca], measure_loss),
            Measurement("encodings", text("RoPE", seeds=seeds[:3]), rescaled_modes(length), measure_loss),
            Measurement("softness", text("xPos", seeds=seeds[:3]), soft, partial(measure_loss, longest=32)),
            Measurement("scale_base", scaled, [dense], partial(measure_loss, longest=16)),
            Measurement("context_use", text("xPos", "RoPE", seeds=seeds[:3]), used, measure_context_use),
            Measurement(
                "recall", task("cosine", "xPos", "RoPE", seeds=seeds[:3], **COSINE), task_modes, measure_recall
            ),
            Measurement("recipes_loss", text(*HEADLINE), [dense], measure_loss),
            Measurement("recipes_loss", text(PARTIAL), [discount], measure_loss),
            Measurement("recipes_recall", task("", *HEADLINE), [dense], far),
            Measurement("recipes_recall", task("", PARTIAL), [task_discount], far),
            Measurement("recipes_loss", text(*normed) + text(based, seeds=first), [dense], measure_loss),
            Measurement("recipes_recall", task("", *normed) + task("", based, seeds=first), [dense], far),
            Measurement("longer", longer, [dense], partial(measure_loss, length=length)),
            Measurement("two_looks", task("two_looks", "RoPE", "xPos", seeds=seeds[:2], **TWO_LOOKS), [dense], twice),
            Measurement("two_looks", task("two_looks", PARTIAL, **TWO_LOOKS), [dense, task_discount], twice),
            Measurement("recipes_use", text(*HEADLINE), [dense], measure_context_use),
            Measurement("recipes_loss", text(*others, seeds=first), [dense], measure_loss),
            Measurement("recall_cosine", task("cosine", *HEADLINE, **COSINE), [dense], far),
            Measurement("recall_cosine", task("cosine", *others_asked, seeds=first, **COSINE), [dense], far),
        ]


def sizes_of(name: str) -> tuple[int, int, int]:
    """The context length, number of heads and of layers of a configuration; each begins with configs/cpu.yaml."""
    model = config("cpu")["model"] | config(name)["model"]
    return config(name)["data"]["context_length"], model["num_heads"], model["num_layers"]


def config(name: str) -> dict[str, Any]:
    return yaml.safe_load(Path(f"configs/{name}.yaml").read_text())


def study(
    size: Literal["cpu", "gpu"] = "cpu",
    output: str = "runs/study",
    results: str = "study/results",
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5),
    paths: list[str] | None = None,
    only: list[str] | None = None,
) -> None:
    """Train and measure what the results lack, and write the documents' tables and plots.

    Args:
        size: of models, data and trainings: that of configs/cpu.yaml or configs/gpu.yaml.
        output: folder for trainings.
        results: folder for a JSON file a measurement. The documents are made from study/results alone.
        seeds: of the main recipes; the first three of the matrix, the first one or two of all other trainings.
        paths: text to train on, as `data.paths` has it; by default the source of Python's standard library.
        only: measurements to make, such as loss or recall; by default all.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds must be different ones, one at least, got {seeds}")
    measurements = Study(size, Path(output), seeds, paths).measurements()
    names = dict.fromkeys(each.name for each in measurements)
    if unknown := set(only or ()) - set(names):
        raise UserError(f"only must name measurements, got {', '.join(unknown)}; there are {', '.join(names)}")
    for each in measurements:
        if only is None or each.name in only:
            complete(each, Path(results) / f"{each.name}.json")
    if Path(results).resolve() == RESULTS:
        write_document()


def complete(measurement: Measurement, path: Path) -> None:
    """Train and measure what the file at `path` lacks."""
    cells = read_cells(path)[1] if path.exists() else []
    there = {(cell["encoding"], cell["label"], cell["seed"]) for cell in cells}
    missing = [
        training
        for training in measurement.trainings
        if any((training.encoding, mode.label, training.seed) not in there for mode in measurement.modes)
    ]
    runs: list[Run] = []
    for training in missing:
        print(f"\n{measurement.name}: {training.encoding}, seed {training.seed}", flush=True)
        torch.compiler.reset()  # or the layers of one training count as graphs of another's, whose number is limited
        training.work()
        runs.append(replace(find_runs([training.folder], training.option)[0], encoding=training.encoding))
        measurement.work(runs, measurement.modes, path)


if __name__ == "__main__":
    command(study)
