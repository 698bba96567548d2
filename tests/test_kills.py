"""Killed again and again, a training that the same command restarts ends as if nothing had been."""

import csv
import random
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from killed import MOMENTS, Trainer
from tiny import LAST, options, read_checkpoint, same

STEPS, EVERY = 14, 2
MOST = {"step": 6, "optimizer": 6, "validation": 5, "log": 3, "rename": 3, "renamed": 3, "write": 3}  # calls in a run


def command(folder: Path, name: str) -> list[str]:
    return options(
        folder,
        name=name,
        save_every=EVERY,
        data__num_workers=2,
        data__max_val_windows=8,
        model__dropout=0.2,
        trainer__max_steps=STEPS,
        trainer__val_check_interval=4,
    )


def logged(run: Path) -> dict[tuple[int, str], set[str]]:
    """Each number in the run's logs as it is written there, by step and column."""
    found: dict[tuple[int, str], set[str]] = defaultdict(set)
    for log in sorted(run.glob("metrics/*/metrics.csv")):
        whole = log.read_text().rpartition("\n")[0]  # but what a kill cut
        for row in csv.DictReader(whole.splitlines()):
            for column, value in row.items():
                if value and column not in ("step", "epoch"):
                    found[int(row["step"]), column].add(value)
    return found


def moment(rng: random.Random) -> tuple[str, float]:
    name = rng.choice(list(MOMENTS))
    if name == "clock":
        return name, rng.uniform(0.1, 1)
    return name, rng.randint(1, MOST[name]) + (rng.random() if name == "write" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [8, pytest.param(40, marks=pytest.mark.soak)])
def test_killed_at_random_moments_a_training_ends_as_if_nothing_had_been(kills, tmp_path):
    rng, killed = random.Random(kills), Counter[str]()
    with Trainer() as trainer:
        assert trainer.run(["fit", *command(tmp_path, "whole")]) == 0
        whole = tmp_path / "runs" / "whole" / "seed1"
        for attempt in range(kills):  # of these, each is killed until it comes to its end
            name, before = f"killed{attempt}", 0
            run = tmp_path / "runs" / name / "seed1"
            while True:
                when = moment(rng) if killed.total() < kills else (None, 0)
                code = trainer.run(["fit", *command(tmp_path, name)], *when)
                assert code in (0, -9)
                if (run / LAST).exists():  # it is whole, and of this attempt or the one before
                    step = read_checkpoint(run)["global_step"]
                    assert before <= step <= STEPS
                    assert step % EVERY == 0
                    before = step
                if code == 0:
                    break
                killed[str(when[0])] += 1
            for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers"):
                assert same(read_checkpoint(run)[part], read_checkpoint(whole)[part]), (name, part)
            numbers = logged(whole)
            assert all(values == numbers[key] for key, values in logged(run).items())  # some may be missing
            if killed.total() == kills:
                return
    raise AssertionError(f"only {killed} were killed")
