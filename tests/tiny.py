"""Text, options and callbacks that make a whole training a matter of a second."""

import csv
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch

from train.__main__ import main

CONFIGS = Path(__file__).parents[1] / "configs"
STEPS = 8
LAST = Path("checkpoints") / "last.ckpt"  # in the folder of a run


def write_corpus(folder: Path, files: int = 40, size: int = 600) -> Path:
    """`files` files of at least `size` bytes; by the hash of these names, every split gets some."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        words = (rng.choice(("to", "be", "or", "not", "that", "is", "the", "question")) for _ in range(size // 2))
        (folder / f"{i}.txt").write_text(" ".join(words))
    return folder


def options(tmp_path: Path, config: str = "xpos", **changes: Any) -> list[str]:
    """A shipped configuration, made small; `changes` name options with __ for their dots, None leaves one out."""
    corpus = tmp_path / "corpus"
    if not corpus.exists():
        write_corpus(corpus)
    small: dict[str, Any] = {
        "runs": tmp_path / "runs",
        "data__paths": f"[{corpus}]",
        "data__cache": tmp_path / "cache",
        "data__context_length": 16,
        "data__batch_size": 2,
        "data__max_val_windows": 4,
        "model__embed_dim": 16,
        "model__num_layers": 1,
        "model__num_heads": 2,
        "model__warmup_steps": 2,
        "trainer__max_steps": STEPS,
        "trainer__accelerator": "cpu",
        "trainer__devices": 1,
        "trainer__val_check_interval": 4,
        "trainer__log_every_n_steps": 1,
        "trainer__enable_progress_bar": "false",
        "save_every": 3,
    }
    given = {name: value for name, value in (small | changes).items() if value is not None}
    return ["--config", str(CONFIGS / f"{config}.yaml"), *(f"--{k.replace('__', '.')}={v}" for k, v in given.items())]


def fit(tmp_path: Path, config: str = "xpos", more: tuple[str, ...] = (), **changes: Any) -> Path:
    """Train; gives the run's folder."""
    main(["fit", *options(tmp_path, config, **changes), *more])
    return tmp_path / "runs" / str(changes.get("name", config)) / f"seed{changes.get('seed_everything', 1)}"


def read_checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / LAST, weights_only=True)


def same(a: Any, b: Any) -> bool:
    """Whether two nests of dicts and lists hold equal values, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def interrupted_at(step: int, hook: str = "on_train_batch_end", kill: bool = False) -> tuple[str, ...]:
    args = f'{{"step": {step}, "hook": "{hook}", "kill": {str(kill).lower()}}}'
    return (f'--trainer.callbacks+={{"class_path": "tiny.Interrupt", "init_args": {args}}}',)


def complaint_of(command: Callable[[list[str]], None], args: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one line that a command prints on stderr; checks that there is no other, and the exit status."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        command(args)
    assert exit_info.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def changed_run(run: Path, to: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A run of which there is a changed checkpoint alone."""
    path = to / LAST
    path.parent.mkdir(parents=True)
    content = read_checkpoint(run)
    change(content)
    torch.save(content, path)
    return to


def random_windows(count: int, length: int, tokens: int = 256) -> torch.Tensor:
    return torch.randint(tokens, (count, length), generator=torch.Generator().manual_seed(1))


def sharpened(model: torch.nn.Module, factor: float = 5.0) -> Any:
    """The model with weights so large that what attention does shows, for evaluation in float64."""
    for parameter in model.parameters():
        parameter.data *= factor
    return model.double().eval()


def metrics(run: Path, column: str) -> dict[int, float]:
    """Of all the folder's logs, by step."""
    logs = [path.read_text().splitlines() for path in sorted(run.glob("metrics/*/metrics.csv"))]
    rows = [row for log in logs for row in csv.DictReader(log)]
    return {int(row["step"]): float(row[column]) for row in rows if row.get(column)}


def in_subprocess(*args: object) -> subprocess.CompletedProcess[str]:
    """Python with these arguments."""
    env = os.environ | {"PYTHONPATH": f"{CONFIGS.parent}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=CONFIGS.parent, env=env, capture_output=True, text=True, timeout=240)


class InterruptionError(Exception):
    """What `Interrupt` raises."""


class Interrupt(L.Callback):
    """Ends a training at a step, in a hook: by an exception, or as abruptly as an operating system can."""

    def __init__(self, step: int, hook: str = "on_train_batch_end", kill: bool = False):
        self.step, self.kill = step, kill
        setattr(self, hook, self.end)

    def end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not trainer.sanity_checking:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise InterruptionError


class Recorder(L.Callback):
    """Keeps every training batch of the last training."""

    batches: ClassVar[list[torch.Tensor]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        Recorder.batches = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: torch.Tensor, batch_idx: int) -> None:
        Recorder.batches.append(batch)
