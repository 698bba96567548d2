"""`make demo`, made small: stopped anywhere and started again, it ends as if it had not been stopped."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny import CONFIGS, InterruptionError, Recorder, options, write_corpus

import train.demo
import train.extrapolate
from train.__main__ import main
from train.demo import demo
from train.extrapolate import extrapolate


@pytest.fixture
def small_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_replicates: None) -> dict[str, Any]:
    """Makes `demo()` work in `tmp_path` and stop where "stop_at" says: in a training, at a step, or after a cell."""
    plan: dict[str, Any] = {"stop_at": None, "trained": [], "cells": 0}
    write_corpus(tmp_path / "corpus")
    (tmp_path / "configs").symlink_to(CONFIGS)
    monkeypatch.chdir(tmp_path)
    small = options(tmp_path, runs="runs")[2:]

    def run(args: list[str]) -> None:
        stop = plan["stop_at"]
        interrupt = []
        if isinstance(stop, tuple) and args[2].endswith(f"{stop[0]}.yaml"):
            interrupt = [f'--trainer.callbacks+={{"class_path": "tiny.Interrupt", "init_args": {{"step": {stop[1]}}}}}']
        Recorder.batches = []
        try:
            main([*args, *small, "--trainer.callbacks+=tiny.Recorder", *interrupt])
        finally:
            plan["trained"].append(len(Recorder.batches))

    measure = train.extrapolate.measure

    def measured(*args: Any) -> dict[str, Any]:
        if plan["stop_at"] == plan["cells"]:
            raise InterruptionError
        plan["cells"] += 1
        return measure(*args)

    monkeypatch.setattr(train.demo, "run", run)
    monkeypatch.setattr(train.demo, "extrapolate", partial(extrapolate, longest=2, windows=4, device="cpu"))
    monkeypatch.setattr(train.extrapolate, "measure", measured)
    return plan


@pytest.mark.slow
def test_a_demo_that_is_stopped_again_and_again_ends_the_same(
    small_demo: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo()
    results = (tmp_path / "runs" / "extrapolation" / "report.md").read_text()
    assert small_demo["trained"] == [8, 8]
    assert small_demo["cells"] == 8
    (tmp_path / "runs").rename(tmp_path / "whole")

    small_demo.update(trained=[], cells=0)
    for stop in (("xpos", 2), ("xpos", 5), ("rotary", 7), 0, 4):
        small_demo["stop_at"] = stop
        with pytest.raises(InterruptionError):
            demo()
    small_demo["stop_at"] = None
    capsys.readouterr()
    demo()
    assert (tmp_path / "runs" / "extrapolation" / "report.md").read_text() == results
    assert small_demo["trained"] == [2, 5, 5, 7, 0, 2, 0, 0, 0, 0]  # checkpoints are at steps 3 and 6
    assert small_demo["cells"] == 8
    assert capsys.readouterr().out.strip().endswith("the plot is runs/extrapolation/extrapolation.png")


def test_a_demo_in_a_folder_of_other_runs_says_so_in_one_line(
    small_demo: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    demo()
    results = Path("runs/extrapolation/results.json")
    results.write_text(results.read_text().replace('"longest": 2', '"longest": 4'))
    capfd.readouterr()
    with pytest.raises(SystemExit, match="2"):
        demo()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: output: {results} has other settings (longest 4 there, 2 here)")
