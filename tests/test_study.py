"""The study, made small: everything is trained and measured once, and what was stopped goes on where it was."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from test_retrieval import recall_options
from tiny import CONFIGS, InterruptionError, complaint_of, options

import train.study
from train.__main__ import main as fit
from train.context_use import context_use
from train.extrapolate import extrapolate
from train.retrieval import main as fit_retrieval
from train.retrieval_accuracy import retrieval_accuracy
from train.study import Study, main, study

MEASUREMENTS = [
    *("extrapolation", "baselines", "rescaled", "context_use", "retrieval"),
    *(f"temperature{c:g}" for c in train.study.TEMPERATURES),
    *(f"tail{p:g}" for p in train.study.TAILS),
]


def plan(tmp_path: Path, configs: Path = CONFIGS, seeds: tuple[int, ...] = (1, 2)) -> Study:
    return Study(configs, tmp_path / "study", list(seeds), None)


@pytest.mark.parametrize("configs", [CONFIGS, CONFIGS / "gpu"])
def test_scale_bases_are_the_octaves_about_half_the_length_and_the_authors(configs: Path, tmp_path: Path) -> None:
    length = plan(tmp_path, configs).context_length
    assert plan(tmp_path, configs).scale_bases == sorted(
        {length // 8, length // 4, length // 2, length, length * 4, 512}
    )
    names = [step.name for step in plan(tmp_path, configs).steps()]
    assert len(set(names)) == len(names)
    # Half the length is that of the main matrix, which is not trained twice.
    assert f"measure scale_base {length // 2}" in names
    assert f"train xpos, scale_base {length // 2}" not in names
    for name in ("xpos", "rotary", "alibi", "none", "retrieval/xpos", "retrieval/rotary"):
        assert (configs / f"{name}.yaml").is_file()


def test_every_training_comes_before_what_measures_it(tmp_path: Path) -> None:
    names = [step.name for step in plan(tmp_path).steps()]
    assert max(i for i, name in enumerate(names) if name.startswith("train")) < names.index("measure loss")


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_replicates: None) -> dict[str, Any]:
    """Makes `study` small, and stop in the work after "stop_at" many; keeps what was done in "done"."""
    state: dict[str, Any] = {"stop_at": None, "done": []}

    def counted(work: Any) -> Any:
        def call(*args: Any, **options: Any) -> None:
            if len(state["done"]) == state["stop_at"]:
                raise InterruptionError
            work(*args, **options)
            state["done"].append(args)

        return call

    text = options(tmp_path, runs=None, trainer__max_steps=2)[2:]
    recall = recall_options(tmp_path, runs=None, trainer__max_steps=2)[2:]
    monkeypatch.setattr(train.study, "run", counted(lambda args: fit([*args, *text])))
    monkeypatch.setattr(train.study.retrieval, "main", counted(lambda args: fit_retrieval([*args, *recall])))
    monkeypatch.setattr(train.study.Study, "context_length", 16)  # as `options` has it
    monkeypatch.setattr(train.study, "SWEEP_LONGEST", 2)
    monkeypatch.setattr(train.study, "SCALE_LONGEST", 2)
    for name, measure in (
        ("extrapolate", partial(extrapolate, windows=2, device="cpu")),
        ("context_use", partial(context_use, windows=2, longest=2, device="cpu")),
        ("retrieval_accuracy", partial(retrieval_accuracy, samples=4, longest=2, device="cpu")),
    ):
        short = partial(measure, longest=2) if name == "extrapolate" else measure
        monkeypatch.setattr(train.study, name, counted(short))
    return state


@pytest.mark.slow
def test_a_study_that_is_stopped_again_and_again_ends_the_same(
    small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    for stop_at in (0, 3, 20, None):
        small.update(stop_at=stop_at, done=[])
        if stop_at is None:
            study(output=str(stopped), configs=str(CONFIGS), seeds=[1])
        else:
            with pytest.raises(InterruptionError):
                study(output=str(stopped), configs=str(CONFIGS), seeds=[1])
    shown = capsys.readouterr().out
    assert "[1/" in shown
    assert "min left" in shown
    study(output=str(whole), configs=str(CONFIGS), seeds=[1])
    assert (stopped / "sweeps.md").read_bytes() == (whole / "sweeps.md").read_bytes()
    for name in MEASUREMENTS:
        report = (whole / "measured" / name / "report.md").read_text()
        assert (stopped / "measured" / name / "report.md").read_text() == report, name
    sweeps = (whole / "sweeps.md").read_text()
    for value, mode, sign in ((0.4, "temperature", "c"), (8.0, "tail", "p")):
        cells = json.loads((whole / "measured" / f"{mode}{value:g}" / "summary.json").read_text())["cells"]
        (rise,) = [cell["against_L"] for cell in cells if cell["context"] == 32]
        (row,) = [line for line in sweeps.splitlines() if line.startswith(f"| {sign} = {value:g} ")]
        assert row.endswith("{:+.3f} [{:+.3f}, {:+.3f}] |".format(*rise))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--seeds", "[]"], "seeds must be different ones, one at least, got []"),
        (["--seeds", "[1, 1]"], "seeds must be different ones, one at least, got [1, 1]"),
        (["--configs", "nowhere"], "configs must be a folder with data.yaml and the configurations, got 'nowhere'"),
        (["--sedes", "1"], "unrecognized arguments: --sedes 1; did you mean seeds?"),
    ],
)
def test_a_wrong_argument_is_told_in_one_line(args: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert complaint_of(main, args, capfd).startswith(message)
