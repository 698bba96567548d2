"""Killed at random moments again and again, a training that the same command restarts ends as if nothing had been."""

import csv
import math
import random
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from killed import MOMENTS, Trainer
from test_command_line import same
from tiny import options, read_checkpoint

STEPS, EVERY, VALIDATED = 14, 2, 4
KILLS = 20
WHOLE = ("global_step", "state_dict", "optimizer_states", "lr_schedulers")


def command(folder: Path, name: str, workers: int) -> list[str]:
    return options(
        folder,
        name=name,
        data__num_workers=workers,
        data__max_val_windows=8,
        model__dropout=0.2,
        trainer__max_steps=STEPS,
        trainer__val_check_interval=VALIDATED,
        trainer__callbacks__every_n_train_steps=EVERY,
    )


def joined(run: Path) -> dict[tuple[int, str], str]:
    """Each number in the run's logs as it is written there, by step and column; its logs must agree with each other.

    A last line without its end is what a kill left.
    """
    found: dict[tuple[int, str], set[str]] = defaultdict(set)
    for log in sorted(run.glob("metrics/*/metrics.csv")):
        lines = [line for line in log.read_bytes().decode().splitlines(keepends=True) if line.endswith("\n")]
        for row in csv.DictReader(lines):
            for column, value in row.items():
                if value and column not in ("step", "epoch"):
                    found[int(row["step"]), column].add(value)
    assert {key: values for key, values in found.items() if len(values) != 1} == {}
    return {key: values.pop() for key, values in found.items()}


def moment_of(rng: random.Random, seconds: float) -> tuple[str, float]:
    moment = rng.choice(MOMENTS)
    most = {"step": 6, "optimizer": 6, "validation": 5, "log": 3, "rename": 3, "renamed": 3, "write": 3}
    if moment == "clock":
        return moment, rng.uniform(0.1, 1) * seconds
    return moment, rng.randint(1, most[moment]) + (rng.random() if moment == "write" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_random_moments_a_training_ends_as_if_nothing_had_been(workers: int, tmp_path: Path) -> None:
    rng = random.Random(workers)
    killed: Counter[str] = Counter()
    with Trainer() as trainer:
        assert trainer.run(["fit", *command(tmp_path, "whole", workers)]) == 0
        whole = tmp_path / "runs" / "whole" / "seed1"
        done = read_checkpoint(whole)
        rounds = 0
        while killed.total() < KILLS:
            # A training of its own for every few kills, since each of them that got somewhere brings it nearer the end.
            rounds += 1
            name = f"killed{rounds}"
            run = tmp_path / "runs" / name / "seed1"
            last, before = run / "checkpoints" / "last.ckpt", 0
            while True:
                moment, count = moment_of(rng, 1.0) if killed.total() < KILLS else (None, 0)
                code = trainer.run(["fit", *command(tmp_path, name, workers)], moment, count)
                assert code in (0, -9)
                if last.exists():  # it is whole, and of this attempt or the one before
                    step = read_checkpoint(run)["global_step"]
                    assert before <= step <= STEPS
                    assert step % EVERY == 0
                    before = step
                if code == 0:
                    break
                assert moment is not None
                killed[moment] += 1
            for part in WHOLE:
                assert same(read_checkpoint(run)[part], done[part]), (name, part)
            assert joined(run) == joined(whole)
    assert len(killed) > len(MOMENTS) / 2
    assert {step for step, column in joined(whole) if column == "train_bits_per_byte"} == set(range(STEPS))
    assert {step + 1 for step, column in joined(whole) if column == "val_bits_per_byte"} == set(
        range(VALIDATED, STEPS + 1, VALIDATED)
    )
    assert all(math.isfinite(float(value)) for value in joined(whole).values())
