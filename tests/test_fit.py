"""`python -m train fit`: configurations, and a run that goes on from where it was to the same end, bit for bit."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from filelock import FileLock
from tiny import (
    CONFIGS,
    STEPS,
    InterruptionError,
    Recorder,
    complaint_of,
    fit,
    in_subprocess,
    interrupted_at,
    metrics,
    options,
    read_checkpoint,
    same,
    snapshot,
)

from train.__main__ import main
from train.language_model import LanguageModel
from xpos_zoo import XPOS

LAST = Path("checkpoints") / "last.ckpt"


def interrupt(tmp_path: Path, step: int, hook: str = "on_train_batch_end", **changes: Any) -> Path:
    """Train until that step; gives the run's folder."""
    with pytest.raises(InterruptionError):
        fit(tmp_path, more=interrupted_at(step, hook), **changes)
    return tmp_path / "runs" / str(changes.get("name", "xpos")) / "seed1"


def assert_same_run(run: Path, other: Path) -> None:
    ours, theirs = read_checkpoint(run), read_checkpoint(other)
    for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers"):
        assert same(ours[part], theirs[part]), part


# --- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", sorted({path.stem for path in CONFIGS.glob("*.yaml")} - {"recall", "gpu_recall"}))
def test_every_configuration_trains_and_validation_reads_what_it_left(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more: dict[str, Any] = {"trainer__callbacks": None, "trainer__precision": "32", "data__split_by": "file"}
    changes = {"data__num_workers": 0, "model__compile": "false", **more}
    if config == "alibi":
        changes["model__positions__num_heads"] = 2  # as `options` has it
    run = fit(tmp_path, config, **changes)
    assert read_checkpoint(run)["global_step"] == STEPS
    assert list(run.glob("tensorboard/events.*"))
    assert metrics(run, "train_bits_per_byte").keys() == set(range(STEPS))
    assert metrics(run, "lr-AdamW/pg1")
    validated = metrics(run, "val_bits_per_byte")
    assert validated.keys() == {3, 7}
    before = snapshot(run)
    for command in ("validate", "test"):
        capsys.readouterr()
        main([command, *options(tmp_path, config, **changes)])
        shown = re.search(rf"{command.replace('validate', 'val')}_bits_per_byte\W+([\d.]+)", capsys.readouterr().out)
        assert shown is not None
        if command == "validate":  # of the weights after the last step
            assert float(shown[1]) == pytest.approx(validated[7], abs=1e-5)
    assert snapshot(run) == before


def test_the_two_encodings_differ_in_one_word_and_train_on_the_same_batches(tmp_path: Path) -> None:
    words = [(CONFIGS / f"{config}.yaml").read_text().split() for config in ("xpos", "rotary")]
    assert [pair for pair in zip(*words, strict=True) if len(set(pair)) > 1] == [("XPOS", "RotaryEmbedding")]
    batches = []
    for config in ("xpos", "rotary"):
        fit(tmp_path, config, more=("--trainer.callbacks+=tiny.Recorder",))
        batches.append(Recorder.batches)
    assert len(batches[0]) == STEPS
    assert same(*batches)


def test_print_config_prints_what_would_be_run_and_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["fit", *options(tmp_path), "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["embed_dim"] == 16
    assert printed["model"]["positions"]["class_path"] == "xpos_zoo.XPOS"
    assert printed["trainer"]["max_steps"] == STEPS
    assert not (tmp_path / "runs").exists()


def test_a_run_keeps_the_configuration_that_repeats_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = fit(tmp_path, model__positions__scale_base=5, seed_everything=3)
    capsys.readouterr()
    main(["fit", "--config", str(first / "config.yaml")])
    assert f"{first / LAST} is finished" in capsys.readouterr().out
    main(["fit", "--config", str(first / "config.yaml"), "--name", "again"])
    again = tmp_path / "runs" / "again" / "seed3"
    assert same(read_checkpoint(again)["state_dict"], read_checkpoint(first)["state_dict"])


@pytest.mark.parametrize(
    ("changes", "used"),
    [
        ({}, 16 / 2),
        ({"model__positions__base": 99}, 16 / 2),
        ({"model__positions__scale_base": 5}, 5),
        ({"model__scale_base": 512}, 512),
    ],
)
def test_scale_base_is_half_the_trained_length_unless_it_is_given(
    changes: dict[str, Any], used: float, tmp_path: Path
) -> None:
    run = fit(tmp_path, trainer__max_steps=1, **changes)
    trained = LanguageModel.load_from_checkpoint(run / LAST, weights_only=True)
    assert {part.scale_base for part in trained.modules() if isinstance(part, XPOS)} == {used}


def test_layers_of_their_own_kinds_come_from_yaml(tmp_path: Path) -> None:
    positions = '["XPOS", {"class_path": "RotaryEmbedding", "init_args": {"max_wavelength": 40}}]'
    more: dict[str, Any] = {"model__positions": positions, "model__block_size": "[4, null]"}
    run = fit(tmp_path, model__num_layers=2, model__embed_dim=32, trainer__max_steps=2, **more)
    model = LanguageModel.load_from_checkpoint(run / LAST, weights_only=True).transformer
    assert [str(type(attention.positions).__name__) for attention in model.attentions] == ["XPOS", "RotaryEmbedding"]
    assert model.attentions[1].positions.max_wavelength == 40
    assert model.block_size == [4, None]


def test_a_trial_run_leaves_no_checkpoint_behind(tmp_path: Path) -> None:
    fit(tmp_path, trainer__fast_dev_run="true")
    assert not list(tmp_path.rglob("*.ckpt"))


# --- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "hook"),
    [
        (0, "on_train_start"),  # before the first step
        (3, "on_train_batch_end"),  # just before the first checkpoint
        (4, "on_train_batch_start"),  # after it
        (4, "on_validation_batch_end"),
        (7, "on_before_optimizer_step"),
        (STEPS, "on_train_batch_end"),  # when all that lacks is the last checkpoint
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(step: int, hook: str, tmp_path: Path, trained: Path) -> None:
    interrupt(tmp_path, step, hook)
    run = fit(tmp_path)
    assert_same_run(run, trained)
    whole = metrics(trained, "train_bits_per_byte")
    assert whole.items() >= metrics(run, "train_bits_per_byte").items()
    assert metrics(run, "val_bits_per_byte").items() <= metrics(trained, "val_bits_per_byte").items()


def test_with_dropout_workers_accumulation_and_bfloat16_a_run_goes_on_to_the_same_end(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "model__dropout": 0.2,
        "data__num_workers": 2,
        "trainer__accumulate_grad_batches": 2,
        "trainer__precision": "bf16-true",
    }
    for step in (2, 5, 7):
        interrupt(tmp_path, step, **changes)
    run, whole = fit(tmp_path, **changes), fit(tmp_path, name="whole", **changes)
    assert_same_run(run, whole)
    weights = read_checkpoint(run)["state_dict"]
    assert {w.dtype for name, w in weights.items() if not name.endswith(".scale")} == {torch.bfloat16}


@pytest.mark.parametrize(
    "changes", [{"data__num_workers": 1}, {"model__checkpoint_activations": "true"}, {"trainer__log_every_n_steps": 2}]
)
def test_what_does_not_change_the_numbers_may_change_when_a_run_goes_on(
    changes: dict[str, Any], tmp_path: Path, trained: Path
) -> None:
    interrupt(tmp_path, 5)
    assert_same_run(fit(tmp_path, **changes), trained)


def test_a_run_that_was_moved_and_is_saved_more_often_keeps_one_last_checkpoint(tmp_path: Path, trained: Path) -> None:
    interrupt(tmp_path, 4)
    (tmp_path / "runs").rename(tmp_path / "moved")
    changes: dict[str, Any] = {"runs": tmp_path / "moved", "save_every": 2}
    with pytest.raises(InterruptionError):
        fit(tmp_path, more=interrupted_at(7), **changes)
    run = tmp_path / "moved" / "xpos" / "seed1"
    assert read_checkpoint(run)["global_step"] == 6
    fit(tmp_path, **changes)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    assert_same_run(run, trained)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"model__num_heads": 1}, "model.num_heads: 2 there, 1 here"),
        ({"model__positions": "RotaryEmbedding"}, "model.positions.class_path: xpos_zoo.XPOS there, xpos_zoo.Rotary"),
        ({"model__schedule": "linear"}, "model.schedule: cosine there, linear here"),
        ({"data__batch_size": 3}, "data.batch_size: 2 there, 3 here"),
        ({"trainer__max_steps": 9}, "trainer.max_steps: 8 there, 9 here"),
        ({"trainer__precision": "bf16-true"}, "trainer.precision: None there, bf16-true here"),
        ({"data__tokenizer": "tokenizer.json"}, "data.tokenizer"),
    ],
)
def test_a_folder_of_another_run_is_left_alone(
    changes: dict[str, Any], difference: str, copy_of_trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(copy_of_trained / "runs")
    line = complaint_of(main, ["fit", *options(copy_of_trained, **changes)], capfd)
    assert difference in line
    assert snapshot(copy_of_trained / "runs") == before


def test_a_run_of_a_text_that_has_changed_is_left_alone(
    copy_of_trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = copy_of_trained / "runs" / "xpos" / "seed1" / LAST
    content = torch.load(checkpoint, weights_only=True)
    content["global_step"] = 5
    torch.save(content, checkpoint)
    (copy_of_trained / "corpus" / "0.txt").write_text("quite another text " * 50)
    line = complaint_of(main, ["fit", *options(copy_of_trained)], capfd)
    assert "holds a run of another text" in line


@pytest.mark.parametrize("content", [None, "", "model: {", "- 1"])
def test_a_folder_without_its_configuration_is_left_alone(
    content: str | None, copy_of_trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = copy_of_trained / "runs" / "xpos" / "seed1" / "config.yaml"
    config.unlink() if content is None else config.write_text(content)
    line = complaint_of(main, ["fit", *options(copy_of_trained)], capfd)
    assert line.startswith(f"{config} is missing or damaged")


def test_a_finished_run_is_left_as_it_is(copy_of_trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(copy_of_trained / "runs")
    fit(copy_of_trained)
    assert f"{LAST} is finished, with 8 of 8 steps" in capsys.readouterr().out
    assert snapshot(copy_of_trained / "runs") == before


def test_two_processes_do_not_train_one_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "runs" / "xpos" / "seed1"
    run.mkdir(parents=True)
    with FileLock(run / ".lock"):
        line = complaint_of(main, ["fit", *options(tmp_path)], capfd)
    assert line == f"{run} is being trained by another process; wait for it, or end it"
    assert read_checkpoint(fit(tmp_path))["global_step"] == STEPS


def test_a_damaged_checkpoint_is_told_and_removed_the_run_goes_on(
    tmp_path: Path, trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = interrupt(tmp_path, 5) / LAST
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    line = complaint_of(main, ["fit", *options(tmp_path)], capfd)
    assert line.startswith(f"{checkpoint} is no checkpoint, or a damaged one")
    checkpoint.unlink()
    assert_same_run(fit(tmp_path), trained)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_in_one_line_and_leaves_the_checkpoint_before_it(
    tmp_path: Path, trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = interrupt(tmp_path, 5) / LAST
    before = checkpoint.read_bytes()
    checkpoint.with_name("last.ckpt.draft").symlink_to("/dev/full")
    line = complaint_of(main, ["fit", *options(tmp_path)], capfd)
    assert line.startswith(f"the checkpoint {checkpoint} cannot be written: No space left on device")
    assert checkpoint.read_bytes() == before
    assert_same_run(fit(tmp_path), trained)


# --- beginning from another run's checkpoint -------------------------------------------------------------------------


def test_training_begins_from_a_named_checkpoint_and_goes_on_from_its_own(tmp_path: Path, trained: Path) -> None:
    begin = interrupt(tmp_path, 5)
    copied: dict[str, Any] = {"name": "copy", "checkpoint": begin / LAST}
    interrupt(tmp_path, 7, **copied)
    run = fit(tmp_path, more=("--trainer.callbacks+=tiny.Recorder",), **copied)
    assert len(Recorder.batches) == STEPS - 6
    assert_same_run(run, trained)


def test_a_run_that_begins_from_another_has_its_own_rates(tmp_path: Path, trained: Path) -> None:
    own: dict[str, Any] = {
        "trainer__max_steps": STEPS + 4,
        "model__learning_rate": 1e-3,
        "model__schedule": "linear",
        "model__weight_decay": 0.3,
    }
    whole, longer = (
        read_checkpoint(fit(tmp_path, name=name, checkpoint=begin, **own))
        for name, begin in (("whole", None), ("longer", trained))
    )
    assert whole["global_step"] == longer["global_step"] == STEPS + 4
    assert whole["lr_schedulers"] == longer["lr_schedulers"]
    assert whole["optimizer_states"][0]["param_groups"] == longer["optimizer_states"][0]["param_groups"]
    assert not same(whole["state_dict"], longer["state_dict"])


# --- what ends a training --------------------------------------------------------------------------------------------


class Spoil(L.Callback):
    """Makes a weight infinite or not a number when so many steps are done."""

    def __init__(self, step: int, value: str):
        self.step, self.value = step, float(value)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                pl_module.transformer.norm.weight[0] = self.value


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_weights_that_are_not_finite_end_the_run_and_reach_no_checkpoint(
    value: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil = f'--trainer.callbacks+={{"class_path": "test_fit.Spoil", "init_args": {{"step": 4, "value": "{value}"}}}}'
    line = complaint_of(main, ["fit", *options(tmp_path), spoil], capfd)
    assert "is not finite after step 6; training stopped, and its last checkpoint is from before" in line
    assert read_checkpoint(tmp_path / "runs" / "xpos" / "seed1")["global_step"] == 3


def test_a_training_that_no_longer_improves_stops_early_and_stays_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = '{"monitor": "val_bits_per_byte", "min_delta": 100.0, "patience": 1}'
    stopping = (f'--trainer.callbacks+={{"class_path": "EarlyStopping", "init_args": {args}}}',)
    changes: dict[str, Any] = {"trainer__max_steps": 20, "trainer__val_check_interval": 2}
    run = fit(tmp_path, more=stopping, **changes)
    assert read_checkpoint(run)["global_step"] == 4  # the second validation is no better than the first by 100
    fit(tmp_path, more=stopping, **changes)
    assert "is finished, with 4 of 20 steps" in capsys.readouterr().out
    assert read_checkpoint(fit(tmp_path, **changes))["global_step"] == 20  # without early stopping it goes on


class Press(L.Callback):
    """Sends what Ctrl-C sends."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_ends_in_one_line_with_status_130_and_the_run_goes_on(
    tmp_path: Path, trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is in its background without
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", *options(tmp_path), "--trainer.callbacks+=test_fit.Press"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores it from then on
    assert exit_info.value.code == 130
    assert capfd.readouterr().err == "interrupted: the same command goes on where it was\n"
    assert_same_run(fit(tmp_path), trained)


@pytest.mark.slow
def test_a_process_prints_one_line_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    done = in_subprocess(["fit", *options(tmp_path)])
    assert done.returncode == 2
    assert done.stderr == f"error: data.paths: there is no file in '{tmp_path / 'corpus'}'\n"
    assert done.stdout == ""
