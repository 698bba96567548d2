"""`python -m train`: every shipped configuration, going on after an interruption, and one line for each bad input."""

import csv
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger
from tiny import (
    CONFIGS,
    STEPS,
    InterruptionError,
    Recorder,
    complaint_of,
    fit,
    options,
    read_checkpoint,
    write_corpus,
)

from train.__main__ import main
from train.language_model import LanguageModel
from xpos_zoo import XPOS

ROOT = CONFIGS.parent
RUNNABLE = ("xpos", "rotary", "alibi", "none")
DEMO = ("xpos", "rotary")
SHIPPED_CALLBACKS: dict[str, Any] = {
    "trainer__callbacks": None,
    "trainer__callbacks__save_last": None,
    "trainer__callbacks__save_top_k": None,
    "trainer__callbacks__every_n_train_steps": None,
}


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


def interrupt(tmp_path: Path, step: int, hook: str = "on_train_batch_end", **changes: Any) -> Path:
    """Train until that step; gives where the run's last checkpoint is, if it has come to one."""
    with pytest.raises(InterruptionError):
        fit(tmp_path, more=interrupted_at(step, hook), **changes)
    return tmp_path / "runs" / str(changes.get("name", "xpos")) / "seed1" / "checkpoints" / "last.ckpt"


def metrics(run: Path, column: str) -> dict[int, float]:
    """Of all the folder's logs, by step."""
    logs = [path.read_text().splitlines() for path in sorted(run.glob("metrics/*/metrics.csv"))]
    rows = [row for log in logs for row in csv.DictReader(log)]
    return {int(row["step"]): float(row[column]) for row in rows if row.get(column)}


def in_subprocess(args: list[str], *, threads: int = 1) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "train", *args]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


# --- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", RUNNABLE)
def test_every_runnable_configuration_trains_validates_and_tests(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(tmp_path, config, **SHIPPED_CALLBACKS)
    checkpoint = read_checkpoint(run)
    assert checkpoint["global_step"] == STEPS
    assert list(run.glob("tensorboard/events.*"))
    assert metrics(run, "train_bits_per_byte").keys() == set(range(STEPS))
    assert metrics(run, "lr-AdamW/pg1")
    validated = metrics(run, "val_bits_per_byte")
    assert validated.keys() == {3, 7}
    before = snapshot(run)
    for command in ("validate", "test"):
        capsys.readouterr()
        main([command, *options(tmp_path, config, **SHIPPED_CALLBACKS)])
        shown = re.search(rf"{command.replace('validate', 'val')}_bits_per_byte\W+([\d.]+)", capsys.readouterr().out)
        assert shown is not None
        if command == "validate":  # of the weights after the last step
            assert float(shown[1]) == pytest.approx(validated[7], abs=1e-5)
    assert snapshot(run) == before


def test_every_shipped_configuration_is_run_by_the_tests() -> None:
    shared = {"data", "trainer"}  # which xpos and rotary name
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == shared | set(RUNNABLE)
    for config in RUNNABLE:
        content = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
        assert {content[group] for group in shared} == {f"{group}.yaml" for group in shared}


def test_the_two_encodings_differ_in_one_word() -> None:
    ours, theirs = ((CONFIGS / f"{config}.yaml").read_text().split() for config in DEMO)
    assert [pair for pair in zip(ours, theirs, strict=True) if len(set(pair)) > 1] == [("XPOS", "RotaryEmbedding")]


def test_both_encodings_are_trained_on_the_same_batches(tmp_path: Path) -> None:
    batches = []
    for config in DEMO:
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


def test_a_run_keeps_the_configuration_that_repeats_it(tmp_path: Path) -> None:
    first = fit(tmp_path, model__scale_base=5, seed_everything=3)
    main(["fit", "--config", str(first / "config.yaml"), "--name", "again"])
    again = tmp_path / "runs" / "again" / "seed3"
    assert same(read_checkpoint(again)["state_dict"], read_checkpoint(first)["state_dict"])


@pytest.mark.parametrize(("given", "used"), [(None, 16 / 2), (512, 512)])
def test_a_recorded_scale_base_is_the_one_that_was_used(given: float | None, used: float, tmp_path: Path) -> None:
    run = fit(tmp_path, model__scale_base=given, trainer__max_steps=1)
    recorded = yaml.safe_load((run / "config.yaml").read_text())["model"]
    assert recorded["scale_base"] == used
    assert "scale_base" not in recorded["positions"]["init_args"]
    checkpoint = run / "checkpoints" / "last.ckpt"
    trained = LanguageModel.load_from_checkpoint(checkpoint, weights_only=True)
    assert {part.scale_base for part in trained.modules() if isinstance(part, XPOS)} == {used}


def test_bf16_mixed_precision_trains_on_float32_weights(tmp_path: Path) -> None:
    run = fit(tmp_path, trainer__precision="bf16-mixed", trainer__max_steps=2)
    weights = read_checkpoint(run)["state_dict"].values()
    assert {weight.dtype for weight in weights} == {torch.float32}
    assert all(torch.isfinite(weight).all() for weight in weights)
    assert not same(read_checkpoint(run)["state_dict"], read_checkpoint(fit(tmp_path, name="full"))["state_dict"])


@pytest.mark.parametrize("block_size", [None, 4])
def test_documents_are_kept_apart_by_a_word_in_the_configuration(block_size: int | None, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", files=200, size=8)
    given: dict[str, Any] = {"data__paths": f"[{corpus}]", "data__context_length": 32, "model__block_size": block_size}
    apart = read_checkpoint(fit(tmp_path, name="apart", data__separate_documents="true", **given))["state_dict"]
    together = read_checkpoint(fit(tmp_path, name="together", **given))["state_dict"]
    assert all(torch.isfinite(weight).all() for weight in apart.values())
    assert not same(apart, together)


def test_gradient_clipping_bounds_the_step(tmp_path: Path) -> None:
    free = fit(tmp_path, name="free", trainer__gradient_clip_val=1e9, trainer__max_steps=1)
    clipped = fit(tmp_path, name="clipped", trainer__gradient_clip_val=1e-3, trainer__max_steps=1)
    # After one step AdamW's first moment is (1 - beta1) = 0.1 times the gradient that it was given.
    norms = []
    for run in (free, clipped):
        moments = read_checkpoint(run)["optimizer_states"][0]["state"].values()
        norms.append(sum(float(moment["exp_avg"].double().square().sum()) for moment in moments) ** 0.5 / 0.1)
    assert norms[0] > 0.01
    assert norms[1] == pytest.approx(1e-3, rel=1e-3)  # torch divides by norm + 1e-6


def test_a_trial_run_leaves_no_checkpoint_behind(tmp_path: Path) -> None:
    fit(tmp_path, trainer__fast_dev_run="true")
    assert not list(tmp_path.rglob("*.ckpt"))
    assert read_checkpoint(fit(tmp_path))["global_step"] == STEPS


@pytest.mark.slow
def test_two_devices_train_by_a_word_in_the_configuration(tmp_path: Path) -> None:
    more = {
        "trainer__strategy": "ddp",
        "trainer__devices": 2,
        "trainer__max_steps": 2,
        "trainer__val_check_interval": 2,
    }
    done = in_subprocess(["fit", *options(tmp_path, **more)])
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "xpos" / "seed1"
    assert read_checkpoint(run)["global_step"] == 2
    single = read_checkpoint(fit(tmp_path, name="single", trainer__max_steps=2))
    assert not same(read_checkpoint(run)["state_dict"], single["state_dict"])  # it saw the other device's windows too


# --- going on --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run = fit(tmp_path_factory.mktemp("uninterrupted"))
    return read_checkpoint(run) | {"metrics": metrics(run, "train_bits_per_byte")}


def assert_equals(run: Path, uninterrupted: dict[str, Any]) -> None:
    resumed = read_checkpoint(run)
    for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers"):
        assert same(resumed[part], uninterrupted[part]), part


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
def test_a_resumed_run_equals_an_uninterrupted_one(
    step: int, hook: str, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    interrupt(tmp_path, step, hook)
    run = fit(tmp_path)
    assert_equals(run, uninterrupted)
    assert metrics(run, "train_bits_per_byte") == pytest.approx(uninterrupted["metrics"], rel=1e-12)


def test_a_run_that_is_interrupted_again_and_again_still_equals_an_uninterrupted_one(
    tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    for step in (2, 4, 7):
        interrupt(tmp_path, step)
    assert_equals(fit(tmp_path), uninterrupted)


@pytest.mark.slow
def test_a_killed_process_leaves_a_run_that_goes_on_to_the_same_end(tmp_path: Path) -> None:
    killed = in_subprocess(["fit", *options(tmp_path), *interrupted_at(5, kill=True)])
    assert killed.returncode == -9
    run = tmp_path / "runs" / "xpos" / "seed1"
    assert read_checkpoint(run)["global_step"] == 3
    for name in ("xpos", "whole"):
        assert in_subprocess(["fit", *options(tmp_path, name=name)]).returncode == 0
    assert_equals(run, read_checkpoint(tmp_path / "runs" / "whole" / "seed1"))


def test_training_goes_on_from_a_checkpoint_that_is_named(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    begun = interrupt(tmp_path, 5)
    run = fit(tmp_path, name="copy", more=(f"--ckpt_path={begun}", "--trainer.callbacks+=tiny.Recorder"))
    assert len(Recorder.batches) == STEPS - 3
    assert_equals(run, uninterrupted)


def test_a_run_that_was_begun_from_a_named_checkpoint_goes_on_from_its_own(
    tmp_path: Path, uninterrupted: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    begun = interrupt(tmp_path, 4)
    copied: dict[str, Any] = {"name": "copy", "ckpt_path": begun}
    interrupt(tmp_path, 7, **copied)
    run = fit(tmp_path, more=("--trainer.callbacks+=tiny.Recorder",), **copied)
    assert len(Recorder.batches) == STEPS - 6
    assert_equals(run, uninterrupted)
    before = snapshot(run)
    fit(tmp_path, **copied)
    assert snapshot(run) == before
    line = complaint(["fit", *options(tmp_path, name="copy", ckpt_path="another.ckpt")], capfd)
    assert line.startswith(f"{run} holds a run that was not begun with ckpt_path another.ckpt; give this one a --name")


def test_a_run_that_goes_on_from_another_has_its_own_rates(tmp_path: Path) -> None:
    shorter = fit(tmp_path, name="shorter", model__schedule="wsd") / "checkpoints" / "last.ckpt"
    own: dict[str, Any] = {
        "trainer__max_steps": STEPS + 4,
        "model__learning_rate": 1e-3,
        "model__schedule": "linear",
        "model__weight_decay": 0.3,
    }
    whole, longer = (
        read_checkpoint(fit(tmp_path, name=name, ckpt_path=begun, **own))
        for name, begun in (("whole", None), ("longer", shorter))
    )
    for content in (whole, longer):
        assert content["global_step"] == STEPS + 4
    assert whole["lr_schedulers"] == longer["lr_schedulers"]
    assert whole["optimizer_states"][0]["param_groups"] == longer["optimizer_states"][0]["param_groups"]
    assert not same(whole["state_dict"], longer["state_dict"])


def test_a_run_whose_callback_or_folder_has_changed_keeps_one_last_checkpoint(
    tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    changes: dict[str, Any] = {}
    for step, changed in ((4, {"trainer__callbacks__every_n_train_steps": 2}), (7, {"runs": tmp_path / "moved"})):
        interrupt(tmp_path, step, **changes)
        changes |= changed
    (tmp_path / "runs").rename(tmp_path / "moved")
    run = tmp_path / "moved" / "xpos" / "seed1"
    assert read_checkpoint(run)["global_step"] == 6
    interrupt(tmp_path, STEPS, **changes)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    fit(tmp_path, **changes)
    assert_equals(run, uninterrupted)


def test_a_run_keeps_its_last_checkpoint_whatever_callbacks_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.__main__.SAVED_EVERY", 2)
    given: dict[str, Any] = SHIPPED_CALLBACKS | {"trainer__callbacks": "Throughput"}
    interrupt(tmp_path, 5, **given)
    run = tmp_path / "runs" / "xpos" / "seed1"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    assert read_checkpoint(run)["global_step"] == 4


def test_two_processes_do_not_train_one_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "runs" / "xpos" / "seed1"
    held = f"""
from pathlib import Path
from train.files import to_itself
with to_itself(Path({str(run / ".lock")!r})) as alone:
    print(alone, flush=True)
    input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=CONFIGS.parent
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        line = complaint(["fit", *options(tmp_path)], capfd)
        assert line == f"{run} is being trained by another process; wait for it, or end it"
        assert [path.name for path in run.iterdir()] == [".lock"]
        other.kill()
    assert read_checkpoint(fit(tmp_path))["global_step"] == STEPS


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fit(tmp_path)
    before = snapshot(run)
    capsys.readouterr()
    fit(tmp_path)
    assert f"{run} is finished" in capsys.readouterr().out
    assert snapshot(run) == before


def test_a_finished_checkpoint_is_not_said_to_be_of_the_folder_that_has_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = fit(tmp_path, trainer__max_steps=2) / "checkpoints" / "last.ckpt"
    capsys.readouterr()
    other = fit(tmp_path, name="other", ckpt_path=checkpoint, trainer__max_steps=2)
    assert capsys.readouterr().out.strip() == f"nothing to train in {other}: {checkpoint} has all 2 steps"
    assert not other.exists()


def test_last_is_the_last_checkpoint_of_the_run(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    interrupt(tmp_path, 5)
    assert_equals(fit(tmp_path, ckpt_path="last"), uninterrupted)
    for command in ("validate", "test"):
        main([command, *options(tmp_path, ckpt_path="last")])


def test_a_run_whose_checkpoint_was_damaged_goes_on_when_that_is_removed(
    tmp_path: Path, uninterrupted: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = interrupt(tmp_path, 5)
    cut_in_half(checkpoint)
    line = complaint(["fit", *options(tmp_path)], capfd)
    assert line.startswith(f"{checkpoint} is no checkpoint, or a damaged one")
    assert line.endswith("or remove it")
    checkpoint.unlink()
    assert_equals(fit(tmp_path), uninterrupted)


def test_an_interrupted_save_leaves_the_checkpoint_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, saves = torch.save, 0

    def save_half(content: Any, file: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == 1:
            return save(content, file)
        file.write(pickle.dumps(saves))
        raise InterruptionError

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_half)
        with pytest.raises(InterruptionError):
            fit(tmp_path)
    assert saves == 2
    run = tmp_path / "runs" / "xpos" / "seed1"
    assert read_checkpoint(run)["global_step"] == 3
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_in_one_line_and_leaves_the_checkpoint_before_it(
    tmp_path: Path, uninterrupted: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = interrupt(tmp_path, 5)
    before = checkpoint.read_bytes()
    checkpoint.with_name("last.ckpt.draft").symlink_to("/dev/full")
    assert complaint(["fit", *options(tmp_path)], capfd) == (
        f"the checkpoint {checkpoint} cannot be written: No space left on device; the one before it is whole; "
        "mend that, and the same command goes on"
    )
    assert checkpoint.read_bytes() == before
    assert_equals(fit(tmp_path), uninterrupted)


# --- bad input -------------------------------------------------------------------------------------------------------


complaint = partial(complaint_of, main)


class Unreachable(CSVLogger):
    """As a logger whose server does not answer."""

    def __init__(self) -> None:
        raise RuntimeError("there is no server")


WRONG_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "a key that is missing": (
        {"data__context_length": "null"},
        "data.context_length\": Expected a <class 'int'>. Got value: None; it has no default, so set it",
    ),
    "a key that there is not": ({"model__embd_dim": 3}, "--model.embd_dim=3; did you mean model.embed_dim?"),
    "a group that there is not": ({"modle__embed_dim": 3}, "--modle.embed_dim=3; did you mean model.embed_dim?"),
    "nothing like it": ({"zzz": 3}, "unrecognized arguments: --zzz=3; --help lists what there is"),
    "a word for a number": (
        {"model__embed_dim": "wide"},
        "model.embed_dim\": Expected a <class 'int'>. Got value: wide",
    ),
    "a fraction for an integer": ({"model__num_layers": 1.5}, "model.num_layers\": Expected a <class 'int'>"),
    "a length that is no number": ({"data__context_length": "long"}, "data.context_length\": Expected a <class 'int'>"),
    "an encoding that there is not": (
        {"model__positions": "Sinus"},
        "right are XPOS, RotaryEmbedding, or the import",
    ),
    "an encoding's option": ({"model__positions__init_args__scale_bse": 3}, "Option 'scale_bse' is not accepted"),
    "a scale_base in two places": (
        {"model__positions__scale_base": 512},
        "model.positions takes no scale_base; give it as model.scale_base",
    ),
    "a scale_base in an encoding's options": (
        {"model__positions__init_args__scale_base": 512},
        "model.positions takes no scale_base; give it as model.scale_base",
    ),
    "a scale_base of what has none": (
        {"model__positions": "RotaryEmbedding", "model__scale_base": 7},
        "model.scale_base is 7, but RotaryEmbedding has no scale_base",
    ),
    "heads that do not divide": ({"model__num_heads": 3}, "model.embed_dim must be divisible by num_heads=3, got 16\n"),
    "an odd head": ({"model__embed_dim": 6}, "model.embed_dim / num_heads must be even and above 0, got 3"),
    "a module without positions": (
        {"model__positions": "torch.nn.Identity"},
        "model.positions must give an xpos_zoo.PositionModule, got Identity; right are XPOS, RotaryEmbedding",
    ),
    "no last checkpoint": ({"ckpt_path": "last"}, "last.ckpt; `python -m train fit` writes one"),
    "a negative seed": ({"seed_everything": -1}, 'seed_everything": Not of type Seed: -1 does not conform'),
    "no steps": ({"trainer__max_steps": -1}, "trainer.max_steps must be above 0, got -1"),
    "no such accelerator": ({"trainer__accelerator": "abacus"}, "invalid accelerator name: `accelerator='abacus'`"),
    "no such strategy": ({"trainer__strategy": "dpp"}, "invalid strategy name: `strategy='dpp'`"),
    "layers that would be split": (
        {
            "trainer__strategy": "lightning.pytorch.strategies.ModelParallelStrategy",
            "trainer__strategy__data_parallel_size": 2,
        },
        "trainer.strategy.tensor_parallel_size must be 1, got auto: a model is sharded over data_parallel_size devices",
    ),
    "a checkpoint in pieces": (
        {
            "trainer__strategy": "lightning.pytorch.strategies.ModelParallelStrategy",
            "trainer__strategy__tensor_parallel_size": 1,
        },
        "trainer.strategy.save_distributed_checkpoint must be False, got True: a checkpoint is one file",
    ),
    "no devices": ({"trainer__devices": 0}, "`Trainer(devices='0')` value is not a valid input"),
    "no such precision": ({"trainer__precision": "int8"}, 'trainer.precision": Does not validate'),
    "no such callback": ({"trainer__callbacks": "ModlCheckpoint"}, 'trainer.callbacks": '),
    "a logger that is not installed": (
        {"trainer__logger": "lightning.pytorch.loggers.CometLogger"},
        "lightning.pytorch.loggers.CometLogger cannot be made: ",
    ),
    "a logger without its server": (
        {"trainer__logger": "test_command_line.Unreachable"},
        "test_command_line.Unreachable cannot be made: there is no server",
    ),
    "a batch of none": ({"data__batch_size": 0}, "data.batch_size must be 1 or above, got 0"),
    "no such folder": ({"data__paths": "[nowhere]"}, "data.paths: there is no file or folder 'nowhere'"),
    "no paths": ({"data__paths": "[]"}, "data.paths: no document with UTF-8 text in []"),
    "a path for a list of paths": ({"data__paths": "nowhere"}, 'data.paths": '),
    "a checkpoint that there is not": (
        {"ckpt_path": "nowhere.ckpt"},
        "there is no checkpoint nowhere.ckpt; `python -m train fit` writes one",
    ),
    "a folder as checkpoint": ({"ckpt_path": "configs"}, "there is no checkpoint configs"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG_OPTIONS.values(), ids=WRONG_OPTIONS.keys())
def test_a_wrong_option_is_told_in_one_line_and_leaves_nothing(
    changes: dict[str, Any], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if changes.get("trainer__callbacks"):
        changes = SHIPPED_CALLBACKS | changes
    assert message in complaint(["fit", *options(tmp_path, **changes)], capfd) + "\n"
    assert not (tmp_path / "runs").exists()


WRONG_CONFIGS: dict[str, tuple[str | None, str]] = {
    "no file": (None, "File does not exist: "),
    "empty": ("", "Unexpected config: ; a configuration file holds a mapping"),
    "a list": ("- 3", "a configuration file holds a mapping: data: ..., model: ..., trainer: ..."),
    "no YAML": ("model: [", "Problems parsing config: while parsing a flow node"),
    "a key that there is not": ("model:\n  embd_dim: 3", "'model.embd_dim'; did you mean model.embed_dim?"),
    "a group that there is not": ("modle:\n  embed_dim: 3", "'modle.embed_dim'; did you mean model.embed_dim?"),
    "a trainer key that there is not": (
        "trainer:\n  max_step: 3",
        "'trainer.max_step'; did you mean trainer.max_steps?",
    ),
    "a wrong type": ("model:\n  learning_rate: fast", "model.learning_rate\": Expected a <class 'float'>"),
    "a group's file that there is not": ("data: nowhere.yaml", "Unable to load config 'nowhere.yaml'"),
}


@pytest.mark.parametrize(("content", "message"), WRONG_CONFIGS.values(), ids=WRONG_CONFIGS.keys())
def test_a_wrong_configuration_file_is_told_in_one_line_and_leaves_nothing(
    content: str | None, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.yaml"
    if content is not None:
        path.write_text(content)
    assert message in complaint(["fit", "--config", str(path), *options(tmp_path)[2:]], capfd)
    assert not (tmp_path / "runs").exists()


def no_text(folder: Path) -> None:
    (folder / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n")


WRONG_TEXTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an empty folder": (lambda folder: None, "data.paths: there is no file in "),
    "no text": (no_text, "data.paths: no document with UTF-8 text in ["),
    "one file": (
        lambda folder: write_corpus(folder, files=1),
        "none of the 1 documents with text fell to the val split, which holds out whole documents; give more, or raise "
        "data.val_fraction",
    ),
    "held out alone": (
        lambda folder: (folder / "2.txt").write_text("of the names in `write_corpus`, one that is held out"),
        "fell to the train split, which holds out whole documents; give more, or lower data.val_fraction and",
    ),
    "less than a window": (
        lambda folder: write_corpus(folder, size=2),
        "bytes, less than one window of data.context_length + 1 = 101; give more text, or lower data.context_length",
    ),
}


@pytest.mark.parametrize(("write", "message"), WRONG_TEXTS.values(), ids=WRONG_TEXTS.keys())
def test_text_that_will_not_do_is_told_in_one_line_and_leaves_nothing(
    write: Callable[[Path], Any], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "corpus").mkdir()
    write(tmp_path / "corpus")
    assert message in complaint(["fit", *options(tmp_path, data__context_length=100)], capfd)
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(tmp_path_factory.mktemp("finished"), trainer__max_steps=2)


def cut_in_half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


class Harmful:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harmed"),))


def drop(*names: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        torch.save({name: value for name, value in content.items() if name not in names}, path)

    return change


WRONG_CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut in half": (cut_in_half, "is no checkpoint, or a damaged one: give one that `python -m train fit` wrote, or "),
    "empty": (lambda path: path.write_bytes(b""), "is no checkpoint, or a damaged one"),
    "text": (lambda path: path.write_text("weights"), "is no checkpoint, or a damaged one"),
    "a pickle of code": (lambda path: path.write_bytes(pickle.dumps(Harmful())), "is no checkpoint, or a damaged one"),
    "code in a checkpoint": (lambda path: torch.save({"a": Harmful()}, path), "is no checkpoint, or a damaged one"),
    "a tensor": (lambda path: torch.save(torch.ones(2), path), "is no checkpoint of this trainer: one holds "),
    "another program's": (drop("hyper_parameters"), "is no checkpoint of this trainer: one holds "),
}


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
@pytest.mark.parametrize(("damage", "message"), WRONG_CHECKPOINTS.values(), ids=WRONG_CHECKPOINTS.keys())
def test_a_damaged_checkpoint_is_told_in_one_line_and_left_alone(
    damage: Callable[[Path], Any],
    message: str,
    command: str,
    finished: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = tmp_path / "damaged.ckpt"
    checkpoint.write_bytes((finished / "checkpoints" / "last.ckpt").read_bytes())
    damage(checkpoint)
    before = checkpoint.read_bytes()
    line = complaint([command, *options(tmp_path, ckpt_path=checkpoint)], capfd)
    assert str(checkpoint) in line
    assert message in line
    assert checkpoint.read_bytes() == before
    assert not (tmp_path / "runs").exists()
    assert not Path("harmed").exists()


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_a_checkpoint_of_another_shape_is_told_with_the_shapes(
    command: str, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = finished / "checkpoints" / "last.ckpt"
    line = complaint([command, *options(tmp_path, ckpt_path=checkpoint, model__embed_dim=32)], capfd)
    assert "belongs to another model: transformer.embedding.weight is (256, 16) in the checkpoint, (256, 32)" in line
    assert re.search(r", and \d+ more$", line)
    assert not (tmp_path / "runs").exists()


OTHER_FUNCTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "scale_base": ({"model__scale_base": 4}, "model.scale_base: 8.0 there, 4.0 here"),
    "its default": ({"data__context_length": 32}, "model.scale_base: 8.0 there, 16.0 here"),
    "heads": ({"model__num_heads": 4}, "model.num_heads: 2 there, 4 here"),
    "encoding": (
        {"model__positions": "RotaryEmbedding"},
        "model.positions.class_path: xpos_zoo.XPOS there, xpos_zoo.RotaryEmbedding here",
    ),
    "frequencies": ({"model__positions__base": 99}, "model.positions.init_args.base: 10000.0 there, 99.0 here"),
    "pairs": ({"model__positions__interleaved": "false"}, "model.positions.init_args.interleaved: True there, False"),
    "key heads": ({"model__num_kv_heads": 1}, "k_proj.weight is (16, 16) in the checkpoint, (8, 16) in the model"),
}


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
@pytest.mark.parametrize(("changes", "message"), OTHER_FUNCTIONS.values(), ids=OTHER_FUNCTIONS.keys())
def test_a_checkpoint_of_another_function_is_told_with_the_difference(
    changes: dict[str, Any],
    message: str,
    command: str,
    finished: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    checkpoint = finished / "checkpoints" / "last.ckpt"
    line = complaint([command, *options(tmp_path, ckpt_path=checkpoint, **changes)], capfd)
    assert line.startswith(f"{checkpoint} belongs to another model: ")
    assert message in line
    assert not (tmp_path / "runs").exists()


def test_a_checkpoint_is_evaluated_at_another_length_and_block_size(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = finished / "checkpoints" / "last.ckpt"
    longer: dict[str, Any] = {"data__context_length": 64, "model__scale_base": 8, "model__block_size": 8}
    main(["test", *options(tmp_path, ckpt_path=checkpoint, **longer)])
    assert "test_bits_per_byte" in capsys.readouterr().out


def test_training_does_not_go_on_from_weights_alone(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "weights.ckpt"
    checkpoint.write_bytes((finished / "checkpoints" / "last.ckpt").read_bytes())
    drop("optimizer_states")(checkpoint)
    line = complaint(["fit", *options(tmp_path, ckpt_path=checkpoint)], capfd)
    assert line == f"{checkpoint} holds weights alone; training goes on only from one with the optimizer's state"


@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_run_that_was_never_trained_is_told_in_one_line(
    command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "runs" / "xpos" / "seed1" / "checkpoints" / "last.ckpt"
    line = complaint([command, *options(tmp_path)], capfd)
    assert line == f"there is no checkpoint {path}; `python -m train fit` writes one"


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"model__num_heads": 1}, "model.num_heads: 2 there, 1 here"),
        ({"model__positions": "RotaryEmbedding"}, "model.positions.class_path: xpos_zoo.XPOS there, xpos_zoo.Rotary"),
        ({"model__scale_base": 3}, "model.scale_base: 8.0 there, 3.0 here"),
        ({"data__batch_size": 3}, "data.batch_size: 2 there, 3 here"),
        ({"trainer__max_steps": 9}, "trainer.max_steps: 8 there, 9 here"),
    ],
)
def test_a_folder_of_another_run_is_left_alone(
    changes: dict[str, Any], difference: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    interrupt(tmp_path, 5)
    before = snapshot(tmp_path / "runs")
    line = complaint(["fit", *options(tmp_path, **changes)], capfd)
    assert difference in line
    assert line.endswith("give this one a --name of its own, or remove that folder")
    assert snapshot(tmp_path / "runs") == before


def test_a_run_that_was_begun_before_there_was_an_option_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = fit(tmp_path, trainer__max_steps=2) / "config.yaml"
    content = yaml.safe_load(config.read_text())
    del content["data"]["field"], content["model"]["block_size"]
    config.write_text(yaml.safe_dump(content))
    capsys.readouterr()
    fit(tmp_path, trainer__max_steps=2)
    assert "is finished" in capsys.readouterr().out
    content["data"]["field"] = "body"
    config.write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit):
        fit(tmp_path, trainer__max_steps=2)
    assert "data.field: body there, text here" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "", "model: {", "- 1"])
def test_a_folder_without_its_configuration_is_left_alone(
    content: str | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = fit(tmp_path, trainer__max_steps=2) / "config.yaml"
    config.unlink() if content is None else config.write_text(content)
    before = snapshot(tmp_path / "runs")
    line = complaint(["fit", *options(tmp_path, trainer__max_steps=2)], capfd)
    assert line.startswith(f"{config} is missing or damaged")
    assert snapshot(tmp_path / "runs") == before


def test_a_seed_has_a_folder_of_its_own(tmp_path: Path) -> None:
    runs = [fit(tmp_path, seed_everything=seed, trainer__max_steps=2) for seed in (1, 2)]
    assert runs[0] != runs[1]
    assert not same(*(read_checkpoint(run)["state_dict"] for run in runs))


def test_runs_in_a_place_that_is_a_file_are_told_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").write_text("not a folder")
    assert "Not a directory" in complaint(["fit", *options(tmp_path)], capfd)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], 'expected "subcommand" to be one of {fit,validate,test}, but it was not provided.'),
        (["predict"], "invalid choice: 'predict' (choose from 'fit', 'validate', 'test')"),
    ],
)
def test_a_missing_or_wrong_subcommand_is_told_in_one_line(
    args: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert message in complaint(args, capfd)


def test_a_process_prints_one_line_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    done = in_subprocess(["fit", *options(tmp_path)])
    assert done.returncode == 2
    assert done.stderr == f"error: data.paths: there is no file in '{tmp_path / 'corpus'}'\n"
    assert done.stdout == ""
