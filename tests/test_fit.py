"""`python -m train fit`: configurations, and a run that goes on from where it was to the same end, bit for bit."""

import builtins
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import lightning.pytorch.callbacks
import pytest
import torch
import yaml
from filelock import FileLock
from tiny import (
    CONFIGS,
    LAST,
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
from train.runs import find_runs
from xpos_zoo import XPOS


def interrupt(tmp_path: Path, step: int, hook: str = "on_train_batch_end", **changes: Any) -> Path:
    """Train until that step; gives the run's folder."""
    with pytest.raises(InterruptionError):
        fit(tmp_path, more=interrupted_at(step, hook), **changes)
    return tmp_path / "runs" / str(changes.get("name", "xpos")) / "seed1"


def assert_same_run(run: Path, other: Path) -> None:
    ours, theirs = read_checkpoint(run), read_checkpoint(other)
    for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers"):
        assert same(ours[part], theirs[part]), part


@pytest.mark.slow
@pytest.mark.parametrize("config", sorted({path.stem for path in CONFIGS.glob("*.yaml")} - {"recall", "gpu_recall"}))
def test_every_configuration_trains_and_validation_reads_what_it_left(config, tmp_path, capsys):
    more: dict[str, Any] = {"trainer__callbacks": None, "trainer__precision": "32", "data__split_by": "file"}
    changes = {"data__num_workers": 0, "model__compile": "false", **more}
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


def test_the_two_encodings_differ_in_one_word_and_train_on_the_same_batches(tmp_path):
    words = [(CONFIGS / f"{config}.yaml").read_text().split() for config in ("xpos", "rotary")]
    assert [pair for pair in zip(*words, strict=True) if len(set(pair)) > 1] == [("XPOS", "RotaryEmbedding")]
    batches = []
    for config in ("xpos", "rotary"):
        fit(tmp_path, config, more=("--trainer.callbacks+=tiny.Recorder",))
        batches.append(Recorder.batches)
    assert len(batches[0]) == STEPS
    assert same(*batches)


def test_a_run_keeps_the_configuration_that_repeats_it(tmp_path, capsys):
    first = fit(tmp_path, model__positions__scale_base=5, seed_everything=3)
    capsys.readouterr()
    main(["fit", "--config", str(first / "config.yaml")])
    assert f"{first / LAST} is finished" in capsys.readouterr().out
    main(["fit", "--config", str(first / "config.yaml"), "--name", "again"])
    again = tmp_path / "runs" / "again" / "seed3"
    assert same(read_checkpoint(again)["state_dict"], read_checkpoint(first)["state_dict"])
    model = LanguageModel.load_from_checkpoint(again / LAST, weights_only=True)
    assert {part.scale_base for part in model.modules() if isinstance(part, XPOS)} == {5}


def test_a_trial_run_leaves_no_checkpoint_behind(tmp_path):
    fit(tmp_path, trainer__fast_dev_run="true")
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("step", "hook", "changes"),
    [
        (0, "on_train_start", {}),  # before the first step
        (3, "on_train_batch_end", {"data__num_workers": 1}),  # just before the first checkpoint
        (4, "on_train_batch_start", {"model__checkpoint_activations": "true"}),  # after it
        (4, "on_validation_batch_end", {"trainer__log_every_n_steps": 2}),
        (7, "on_before_optimizer_step", {}),
        (STEPS, "on_train_batch_end", {}),  # when all that lacks is the last checkpoint
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(step, hook, changes, tmp_path, trained):
    """Though what does not change the numbers is changed."""
    interrupt(tmp_path, step, hook)
    run = fit(tmp_path, **changes)
    assert_same_run(run, trained)
    whole = metrics(trained, "train_bits_per_byte")
    assert whole.items() >= metrics(run, "train_bits_per_byte").items()
    assert metrics(run, "val_bits_per_byte").items() <= metrics(trained, "val_bits_per_byte").items()


@pytest.mark.slow
def test_with_dropout_workers_accumulation_and_bfloat16_a_run_goes_on_to_the_same_end(tmp_path):
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


def test_a_run_that_was_moved_and_is_saved_more_often_keeps_one_last_checkpoint(tmp_path, trained):
    interrupt(tmp_path, 4)
    (tmp_path / "runs").rename(tmp_path / "moved")
    changes: dict[str, Any] = {"runs": tmp_path / "moved", "save_every": 2}
    interrupt(tmp_path, 7, **changes)
    run = tmp_path / "moved" / "xpos" / "seed1"
    assert read_checkpoint(run)["global_step"] == 6
    fit(tmp_path, **changes)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    assert_same_run(run, trained)


def another_text(copy: Path) -> None:
    checkpoint = copy / "runs" / "xpos" / "seed1" / LAST
    content = torch.load(checkpoint, weights_only=True)
    torch.save(content | {"global_step": 5}, checkpoint)
    (copy / "corpus" / "0.txt").write_text("quite another text " * 50)


def config_of(copy: Path) -> Path:
    return copy / "runs" / "xpos" / "seed1" / "config.yaml"


def unchanged(_: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("edit", "changes", "message"),
    [
        (unchanged, {"model__num_heads": 1}, "model.num_heads: 2 there, 1 here"),
        (unchanged, {"model__positions": "RotaryEmbedding"}, "model.positions.class_path: xpos_zoo.XPOS there, "),
        (unchanged, {"model__qk_norm": "true"}, "model.qk_norm: False there, True here"),
        (unchanged, {"model__schedule": "linear"}, "model.schedule: cosine there, linear here"),
        (unchanged, {"data__batch_size": 3}, "data.batch_size: 2 there, 3 here"),
        (unchanged, {"trainer__max_steps": 9}, "trainer.max_steps: 8 there, 9 here"),
        (unchanged, {"trainer__precision": "bf16-true"}, "trainer.precision: None there, bf16-true here"),
        (unchanged, {"data__tokenizer": "tokenizer.json"}, "data.tokenizer"),
        (another_text, {}, "holds a run of another text"),
        (lambda copy: config_of(copy).unlink(), {}, "config.yaml is missing or damaged"),
        (lambda copy: config_of(copy).write_text("model: {"), {}, "config.yaml is missing or damaged"),
        (lambda copy: config_of(copy).write_text("- 1"), {}, "config.yaml is missing or damaged"),
    ],
)
def test_a_folder_of_another_run_is_left_alone(edit, changes, message, copy_of_trained, capfd):
    edit(copy_of_trained)
    before = snapshot(copy_of_trained / "runs")
    assert message in complaint_of(main, ["fit", *options(copy_of_trained, **changes)], capfd)
    assert snapshot(copy_of_trained / "runs") == before


@pytest.mark.parametrize(
    ("changes", "used"),
    [
        ({}, [8]),
        ({"model__positions__scale_base": 512}, [512]),
        ({"model__scale_base": 7}, [7]),
        ({"model__scale_base": 7, "model__positions__scale_base": 512}, [512]),
        (
            {
                "model__num_layers": 2,
                "model__positions": "[XPOS, {class_path: XPOS, init_args: {scale_base: 512}}]",
                "model__scale_base": 7,
            },
            [7, 512],
        ),
    ],
)
def test_a_scale_base_that_is_written_is_the_one_that_is_run_and_recorded(changes, used, tmp_path, capsys):
    run = fit(tmp_path, trainer__max_steps=1, **changes)
    model = LanguageModel.load_from_checkpoint(run / LAST, weights_only=True)
    assert [attention.positions.scale_base for attention in model.transformer.attentions] == used
    config = yaml.safe_load((run / "config.yaml").read_text())["model"]
    for recorded in (config, read_checkpoint(run)["hyper_parameters"]):
        layers = recorded["positions"] if len(used) > 1 else [recorded["positions"]]
        assert [layer["init_args"]["scale_base"] for layer in layers] == used
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["fit", *options(tmp_path, **changes), "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["positions"] == config["positions"]


def test_a_run_of_version_0_2_is_the_run_that_it_was(copy_of_trained, trained, capsys):
    """It knew no qk_norm, and recorded the scale_base of XPOS beside positions that have the library's default."""
    interrupt(copy_of_trained, 5, name="early")
    for name in ("xpos", "early"):
        checkpoint = copy_of_trained / "runs" / name / "seed1" / LAST
        path = checkpoint.parents[1] / "config.yaml"
        config, content = yaml.safe_load(path.read_text()), torch.load(checkpoint, weights_only=True)
        for recorded in (config["model"], content["hyper_parameters"]):
            del recorded["qk_norm"]
            recorded["positions"]["init_args"]["scale_base"] = 512.0
        content["hyper_parameters"]["scale_base"] = 8.0
        path.write_text(yaml.safe_dump(config))
        torch.save(content, checkpoint)
    main(["fit", "--config", str(config_of(copy_of_trained))])
    fit(copy_of_trained)
    assert capsys.readouterr().out.count(f"{LAST} is finished, with 8 of 8 steps") == 2
    assert_same_run(fit(copy_of_trained, name="early"), trained)


def test_a_finished_run_is_left_as_it_is(copy_of_trained, capsys):
    before = snapshot(copy_of_trained / "runs")
    fit(copy_of_trained)
    assert f"{LAST} is finished, with 8 of 8 steps" in capsys.readouterr().out
    assert snapshot(copy_of_trained / "runs") == before


def test_two_processes_do_not_train_one_run(tmp_path, capfd):
    run = tmp_path / "runs" / "xpos" / "seed1"
    run.mkdir(parents=True)
    with FileLock(run / ".lock"):
        line = complaint_of(main, ["fit", *options(tmp_path)], capfd)
    assert line == f"{run} is being trained by another process; wait for it, or end it"
    assert read_checkpoint(fit(tmp_path))["global_step"] == STEPS


def cut_short(checkpoint: Path) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])


def fill_disk(checkpoint: Path) -> None:
    checkpoint.with_name("last.ckpt.draft").symlink_to("/dev/full")


@pytest.mark.parametrize(
    ("spoil", "mend", "message"),
    [
        (cut_short, Path.unlink, "{} is no checkpoint, or a damaged one"),
        pytest.param(
            fill_disk,
            unchanged,
            "the checkpoint {} cannot be written: No space left on device",
            marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full"),
        ),
    ],
)
def test_a_damaged_checkpoint_or_full_disk_is_told_and_mended_the_run_goes_on(
    spoil, mend, message, tmp_path, trained, capfd
):
    checkpoint = interrupt(tmp_path, 5) / LAST
    spoil(checkpoint)
    before = checkpoint.read_bytes()
    line = complaint_of(main, ["fit", *options(tmp_path)], capfd)
    assert line.startswith(message.format(checkpoint))
    assert checkpoint.read_bytes() == before
    mend(checkpoint)
    assert_same_run(fit(tmp_path), trained)


def test_a_run_that_begins_from_another_has_its_own_rates(tmp_path, trained):
    own = {"trainer__max_steps": STEPS + 4, "model__learning_rate": 1e-3, "model__schedule": "linear"}
    whole, longer = (
        read_checkpoint(fit(tmp_path, name=name, checkpoint=begin, **own))
        for name, begin in (("whole", None), ("longer", trained))
    )
    assert whole["global_step"] == longer["global_step"] == STEPS + 4
    assert whole["lr_schedulers"] == longer["lr_schedulers"]
    assert whole["optimizer_states"][0]["param_groups"] == longer["optimizer_states"][0]["param_groups"]
    assert not same(whole["state_dict"], longer["state_dict"])


def test_a_run_that_begins_from_another_goes_on_from_its_own_checkpoint(tmp_path, trained):
    copied: dict[str, Any] = {"name": "copy", "checkpoint": interrupt(tmp_path, 5) / LAST}
    interrupt(tmp_path, 7, **copied)
    assert_same_run(fit(tmp_path, more=("--trainer.callbacks+=tiny.Recorder",), **copied), trained)
    assert len(Recorder.batches) == STEPS - 6


class Spoil(L.Callback):
    """Makes a weight infinite or not a number when so many steps are done."""

    def __init__(self, step: int, value: str):
        self.step, self.value = step, float(value)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                pl_module.transformer.norm.weight[0] = self.value


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_weights_that_are_not_finite_end_the_run_and_reach_no_checkpoint(value, tmp_path, capfd):
    spoil = f'--trainer.callbacks+={{"class_path": "test_fit.Spoil", "init_args": {{"step": 4, "value": "{value}"}}}}'
    line = complaint_of(main, ["fit", *options(tmp_path), spoil], capfd)
    assert "is not finite after step 6; training stopped, and its last checkpoint is from before" in line
    assert read_checkpoint(tmp_path / "runs" / "xpos" / "seed1")["global_step"] == 3


def test_a_training_that_no_longer_improves_stops_early_and_stays_finished(tmp_path, capsys):
    args = '{"monitor": "val_bits_per_byte", "min_delta": 100.0, "patience": 1}'
    stopping = (f'--trainer.callbacks+={{"class_path": "EarlyStopping", "init_args": {args}}}',)
    changes: dict[str, Any] = {"trainer__max_steps": 20, "trainer__val_check_interval": 2}
    run = fit(tmp_path, more=stopping, **changes)
    assert read_checkpoint(run)["global_step"] == 4  # the second validation is no better than the first by 100
    fit(tmp_path, more=stopping, **changes)
    assert "is finished, with 4 of 20 steps" in capsys.readouterr().out
    assert read_checkpoint(fit(tmp_path, **changes))["global_step"] == 20  # without early stopping it goes on


def see(trainer: L.Trainer, _: L.LightningModule) -> None:
    """A hook that keeps the trainer."""
    SEEN[:] = [trainer]


def one_run_is_found(run: Path, _: str) -> None:
    (found,) = find_runs([run])
    assert found.checkpoint == run / LAST
    assert (run / "tensorboard" / LAST).is_file()


def progress_bar_is(name: str) -> Callable[[Path, str], None]:
    def check(*_: Any) -> None:
        assert type(SEEN[0].progress_bar_callback).__name__ == name

    return check


NO_EPOCHS = "training draws random windows, so it has no epochs"
SEEN: list[Any] = []
# For each of Lightning's callbacks its arguments, and why it is refused, or what shows that it worked.
SHIPPED: dict[str, tuple[dict[str, Any], str | Callable[[Path, str], Any]]] = {
    "BackboneFinetuning": ({}, NO_EPOCHS),
    "BaseFinetuning": ({}, NO_EPOCHS),
    "BasePredictionWriter": ({}, "nothing is predicted"),
    "BatchSizeFinder": ({}, "a run's numbers depend on data.batch_size; set it"),
    "Callback": ({}, lambda run, out: None),
    "Checkpoint": ({}, lambda run, out: None),
    "DeviceStatsMonitor": ({"cpu_stats": True}, lambda run, out: "cpu_percent" in all_metrics(run)),
    "EarlyStopping": ({"monitor": "loss"}, "EarlyStopping.monitor must be one of train_bits_per_byte, "),
    "EMAWeightAveraging": ({"update_starting_at_epoch": 1}, "update_starting_at_epoch must not be 1"),
    "GradientAccumulationScheduler": ({"scheduling": {"0": 2}}, "; set trainer.accumulate_grad_batches"),
    "LambdaCallback": ({"on_train_start": "test_fit.see"}, lambda run, out: SEEN[0].global_step == STEPS),
    "LearningRateFinder": ({}, "a run's numbers depend on model.learning_rate; set it"),
    "LearningRateMonitor": ({"log_momentum": True}, lambda run, out: "lr-AdamW/pg1-momentum" in all_metrics(run)),
    "ModelCheckpoint": ({"save_last": True, "every_n_train_steps": 3}, one_run_is_found),
    "ModelPruning": ({"pruning_fn": "l1_unstructured"}, NO_EPOCHS),
    "ModelSummary": ({}, lambda run, out: "Trainable params" in out),
    "OnExceptionCheckpoint": ({"dirpath": "kept"}, "ModelCheckpoint has save_on_exception"),
    "ProgressBar": ({}, progress_bar_is("ProgressBar")),
    "RichModelSummary": ({}, lambda run, out: "Trainable params" in out),
    "RichProgressBar": ({}, progress_bar_is("RichProgressBar")),
    "SpikeDetection": ({}, "Lightning cannot load its state"),
    "StochasticWeightAveraging": ({"swa_lrs": 0.1}, "EMAWeightAveraging averages after each step"),
    "ThroughputMonitor": (
        {"batch_size_fn": "builtins.len", "window_size": 3},
        lambda run, out: "train/device/batches_per_sec" in all_metrics(run),
    ),
    "Timer": ({"interval": "epoch", "duration": "00:00:00:01"}, "Timer.interval must not be epoch"),
    "TQDMProgressBar": ({}, progress_bar_is("TQDMProgressBar")),
    "WeightAveraging": ({}, lambda run, out: read_checkpoint(run)["averaging_state"]["n_averaged"] == STEPS),
}


def all_metrics(run: Path) -> str:
    return (run / "metrics" / "version_0" / "metrics.csv").read_text()


def chosen(*callbacks: tuple[str, dict[str, Any]]) -> tuple[str, ...]:
    """Options that add these callbacks."""
    return tuple(
        f"--trainer.callbacks+={json.dumps({'class_path': name, 'init_args': args})}" for name, args in callbacks
    )


@pytest.mark.filterwarnings("ignore:.*flops_per_batch")  # which ThroughputMonitor can do without
@pytest.mark.parametrize("name", sorted(lightning.pytorch.callbacks.__all__))
def test_each_callback_of_lightning_works_or_is_refused_in_a_line(name, tmp_path, trained, capfd, caplog):
    arguments, outcome = SHIPPED[name]
    bar = {"trainer__enable_progress_bar": str("Progress" in name).lower()}
    more = chosen((name, arguments), ("LambdaCallback", {"on_train_start": "test_fit.see"}))
    more = more[:1] if name == "LambdaCallback" else more
    if isinstance(outcome, str):
        assert outcome in complaint_of(main, ["fit", *options(tmp_path, **bar), *more], capfd)
        assert not (tmp_path / "runs").exists()
    else:
        run = fit(tmp_path, more=more, **bar)
        assert outcome(run, capfd.readouterr().out + caplog.text) in (True, None)
        if name != "WeightAveraging":
            assert_same_run(run, trained)


@pytest.mark.parametrize(
    ("callbacks", "changes", "message"),
    [
        ([("EarlyStopping", {"monitor": "val_accuracy"})], {"trainer__limit_val_batches": 0}, "got val_accuracy"),
        ([("EarlyStopping", {"monitor": "val_accuracy"})] * 2, {}, "more than one stateful callback"),
        ([("ModelCheckpoint", {"every_n_epochs": 2})], {}, "ModelCheckpoint.every_n_epochs must not be 2"),
        (
            [("ModelCheckpoint", {"save_last": True, "dirpath": "runs/xpos/seed1/checkpoints"})],
            {"runs": "runs"},
            "ModelCheckpoint must write its last.ckpt elsewhere than in",
        ),
        ([("Timer", {"duration": "00:00:00:09"})], {"trainer__max_time": "00:00:00:09"}, "both limit the time"),
        ([], {"trainer__logger": "false"}, "LearningRateMonitor needs a logger"),
        ([("SampleText", {"top_k": 0})], {}, "SampleText.top_k must be 1 or above and an integer, got 0"),
        ([("Throughput", {"window_size": 1})], {}, "Throughput.window_size must be 2 or above, got 1"),
    ],
)
def test_callbacks_that_cannot_work_together_are_refused(callbacks, changes, message, tmp_path, monkeypatch, capfd):
    args = ["fit", *options(tmp_path, **changes), *chosen(*callbacks)]
    monkeypatch.chdir(tmp_path)
    assert message in complaint_of(main, args, capfd)
    assert not (tmp_path / "runs").exists()


class Faulty(L.Callback):
    """Raises what it is asked to, in a hook."""

    def __init__(self, error: str, step: int = 2):
        self.error, self.step = error, step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step < self.step:
            return
        if self.error == "generate":
            pl_module.transformer.generate(torch.zeros(1, 0, dtype=torch.long), 1)
        raise getattr(builtins, self.error)("my own")


@pytest.mark.parametrize(
    ("error", "kind"), [("generate", ValueError), ("ValueError", ValueError), ("OSError", OSError)]
)
def test_a_fault_in_a_callback_of_ones_own_keeps_its_traceback(error, kind, tmp_path):
    with pytest.raises(kind):
        fit(tmp_path, more=chosen(("test_fit.Faulty", {"error": error})))


def test_an_exception_leaves_the_checkpoint_of_its_step(tmp_path):
    kept = {
        "dirpath": str(tmp_path / "kept"),
        "filename": "fault",
        "every_n_train_steps": 99,
        "save_on_exception": True,
    }
    more = chosen(("ModelCheckpoint", kept))
    with pytest.raises(InterruptionError):
        fit(tmp_path, more=(*more, *interrupted_at(5)))
    assert torch.load(tmp_path / "kept" / "fault.ckpt", weights_only=True)["global_step"] == 5


class Clock(L.Callback):
    """Time for Lightning's Timer: it passes at the beginning of one batch."""

    now = 0.0

    def __init__(self, batch: int):
        self.batch = batch

    @staticmethod
    def monotonic() -> float:
        return Clock.now

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        Clock.now += 60.0 * (batch_idx == self.batch)


@pytest.mark.parametrize(
    ("batch", "changes", "callbacks"),
    [
        (4, {"trainer__max_time": "00:00:00:59"}, []),
        (
            6,  # the first of the two of a step
            {"trainer__accumulate_grad_batches": 2, "model__dropout": 0.2},
            [("Timer", {"duration": "00:00:00:59"}), ("EMAWeightAveraging", {"decay": 0.5})],
        ),
    ],
)
def test_a_run_out_of_time_says_so_and_resumes_to_the_same_end(
    batch, changes, callbacks, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time", Clock)
    whole = fit(tmp_path, name="whole", more=chosen(*callbacks), **changes)
    more = chosen(*callbacks, ("test_fit.Clock", {"batch": batch}))
    done = (batch + 1) // changes.get("trainer__accumulate_grad_batches", 1)
    run = fit(tmp_path, more=more, **changes)
    assert f"{run}: ended early, after step {done}; the same command resumes it\n" in capsys.readouterr().out
    assert read_checkpoint(run)["global_step"] == done
    fit(tmp_path, more=chosen(*callbacks), **changes)
    assert f"{run}: ended early, after step {done}; resumes, to step {STEPS} on cpu\n" in capsys.readouterr().out
    assert_same_run(run, whole)


class Press(L.Callback):
    """Sends what Ctrl-C sends."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_ends_in_one_line_with_status_130_and_the_run_goes_on(tmp_path, trained, capfd):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is in its background without
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", *options(tmp_path), "--trainer.callbacks+=test_fit.Press"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores it from then on
    assert exit_info.value.code == 130
    assert capfd.readouterr().err == "interrupted: the same command goes on where it was\n"
    assert_same_run(fit(tmp_path), trained)


@pytest.mark.slow
def test_a_process_prints_one_line_and_nothing_else(tmp_path):
    (tmp_path / "corpus").mkdir()
    done = in_subprocess("-m", "train", "fit", *options(tmp_path))
    assert done.returncode == 2
    assert done.stderr == f"error: data.paths: there is no file in '{tmp_path / 'corpus'}'\n"
    assert done.stdout == ""
