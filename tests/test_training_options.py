"""Each option that a training takes from YAML does what it says."""

import math
import os
import re
import signal
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from test_command_line import SHIPPED_CALLBACKS, interrupted_at, metrics, same
from test_language_model import optimizer_of
from tiny import STEPS, InterruptionError, Recorder, complaint_of, fit, options, read_checkpoint
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from train.__main__ import main
from train.callbacks import training_flops
from train.language_model import LanguageModel
from xpos_zoo import Transformer

complaint = partial(complaint_of, main)


def extra(callback: str, **init_args: Any) -> tuple[str, ...]:
    args = ", ".join(f'"{name}": {value!r}'.replace("'", '"') for name, value in init_args.items())
    return (f'--trainer.callbacks+={{"class_path": "{callback}", "init_args": {{{args}}}}}',)


def weights_after(run: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(run)["state_dict"]


# --- what stops a training -------------------------------------------------------------------------------------------


class Spoil(L.Callback):
    """Makes a weight infinite or not a number, in a hook, when so many steps are done."""

    def __init__(self, step: int, hook: str, value: str):
        self.step, self.value = step, float(value)
        setattr(self, hook, self.spoil)

    def spoil(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                pl_module.transformer.norm.weight[0] = self.value


@pytest.mark.parametrize("every", [1, STEPS])  # the loss is looked at when it is logged, at least before a checkpoint
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_checkpoint_before(
    value: str, every: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil = extra("test_training_options.Spoil", step=4, hook="on_train_batch_start", value=value)
    changes: dict[str, Any] = {"trainer__log_every_n_steps": every, "trainer__val_check_interval": STEPS}
    line = complaint(["fit", *options(tmp_path, **changes), *spoil], capfd)
    assert line.startswith("the loss of step 5 is not finite; training stopped, and its last checkpoint is from before")
    run = tmp_path / "runs" / "xpos" / "seed1"
    assert read_checkpoint(run)["global_step"] == 3
    assert same(weights_after(fit(tmp_path)), weights_after(fit(tmp_path, name="well")))  # the same command goes on


def test_a_weight_that_is_not_finite_is_not_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spoil = extra("test_training_options.Spoil", step=6, hook="on_train_batch_end", value="nan")
    line = complaint(["fit", *options(tmp_path), *spoil], capfd)
    assert line.startswith("transformer.norm.weight is not finite after step 6; training stopped, and its last")
    assert read_checkpoint(tmp_path / "runs" / "xpos" / "seed1")["global_step"] == 3


def test_a_training_that_no_longer_improves_stops_early_and_stays_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopping = extra("EarlyStopping", monitor="val_bits_per_byte", min_delta=100.0, patience=1)
    changes: dict[str, Any] = {"trainer__max_steps": 20, "trainer__val_check_interval": 2}
    run = fit(tmp_path, more=stopping, **changes)
    assert read_checkpoint(run)["global_step"] == 4  # the second validation is no better than the first by 100
    capsys.readouterr()
    fit(tmp_path, more=stopping, **changes)
    last = run / "checkpoints" / "last.ckpt"
    assert capsys.readouterr().out == f"{run} is finished: {last} has 4 of 20 steps, and was stopped early\n"
    fit(tmp_path, **changes)  # without early stopping it goes on
    assert read_checkpoint(run)["global_step"] == 20


class Press(L.Callback):
    """Sends what Ctrl-C sends."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGINT)


def test_an_interruption_by_the_keyboard_is_told_in_one_line_with_status_130_and_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is in its background without
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", *options(tmp_path), "--trainer.callbacks+=test_training_options.Press"])
    assert exit_info.value.code == 130
    assert capfd.readouterr().err == "interrupted: the same command goes on where it was\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert read_checkpoint(tmp_path / "runs" / "xpos" / "seed1")["global_step"] == 3
    assert same(weights_after(fit(tmp_path)), weights_after(fit(tmp_path, name="whole")))


# --- what goes on ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"data__num_workers": 1},
        {"model__checkpoint_activations": "true"},
        {"trainer__log_every_n_steps": 2},
        {"trainer__enable_model_summary": "true"},
    ],
)
def test_what_does_not_change_the_numbers_may_change_when_a_run_goes_on(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InterruptionError):
        fit(tmp_path, more=interrupted_at(5))
    assert same(weights_after(fit(tmp_path, **changes)), weights_after(fit(tmp_path, name="whole")))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at every input's
def test_a_run_goes_on_compiled(tmp_path: Path) -> None:
    with pytest.raises(InterruptionError):
        fit(tmp_path, more=interrupted_at(5))
    assert read_checkpoint(fit(tmp_path, model__compile="true"))["global_step"] == STEPS
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"trainer__accumulate_grad_batches": 2}, "trainer.accumulate_grad_batches: 1 there, 2 here"),
        ({"trainer__precision": "bf16-true"}, "trainer.precision: None there, bf16-true here"),
        ({"trainer__gradient_clip_val": 2}, "trainer.gradient_clip_val: 1.0 there, 2"),
        ({"model__schedule": "linear"}, "model.schedule: cosine there, linear here"),
    ],
)
def test_what_changes_the_numbers_may_not(
    changes: dict[str, Any], difference: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InterruptionError):
        fit(tmp_path, more=interrupted_at(5))
    assert difference in complaint(["fit", *options(tmp_path, **changes)], capfd)


def test_a_run_that_was_begun_before_an_option_was_there_goes_on(tmp_path: Path) -> None:
    with pytest.raises(InterruptionError):
        fit(tmp_path, more=interrupted_at(5))
    config = tmp_path / "runs" / "xpos" / "seed1" / "config.yaml"
    lines = config.read_text().splitlines(keepends=True)
    new = ("schedule:", "checkpoint_activations:")
    assert sum(line.strip().startswith(new) for line in lines) == 2
    config.write_text("".join(line for line in lines if not line.strip().startswith(new)))
    assert read_checkpoint(fit(tmp_path))["global_step"] == STEPS


# --- what a step is --------------------------------------------------------------------------------------------------


def gradient_of_first_step(run: Path) -> list[torch.Tensor]:
    """AdamW's first moment after one step, (1 - beta1) = 0.1 times the gradient that it was given."""
    return [state["exp_avg"] / 0.1 for state in read_checkpoint(run)["optimizer_states"][0]["state"].values()]


def test_accumulated_batches_make_the_gradient_of_them_all(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "trainer__max_steps": 1,
        "trainer__gradient_clip_val": None,
        "trainer__val_check_interval": 3,
    }
    run = fit(tmp_path, more=("--trainer.callbacks+=tiny.Recorder",), trainer__accumulate_grad_batches=3, **changes)
    assert [len(batch) for batch in Recorder.batches] == [2, 2, 2]
    L.seed_everything(1)
    module = LanguageModel(16, embed_dim=16, num_layers=1, num_heads=2)
    module.loss(torch.cat(Recorder.batches)).backward()
    parameters = list(module.parameters())
    ours = [p.grad for p in parameters if p.ndim >= 2] + [p.grad for p in parameters if p.ndim < 2]
    norm = torch.cat([g.flatten() for g in ours if g is not None]).norm()
    clip = min(1.0, 1.0 / float(norm))  # of the shipped configuration
    for got, expected in zip(gradient_of_first_step(run), ours, strict=True):
        assert expected is not None
        torch.testing.assert_close(got, expected * clip, rtol=1e-4, atol=1e-6 * float(norm))


def test_a_run_with_accumulated_batches_goes_on_to_the_same_end(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"trainer__accumulate_grad_batches": 2, "trainer__val_check_interval": 6}
    with pytest.raises(InterruptionError):
        fit(tmp_path, more=interrupted_at(5), **changes)
    run, whole = fit(tmp_path, **changes), fit(tmp_path, name="whole", **changes)
    assert same(weights_after(run), weights_after(whole))
    for column in ("train_bits_per_byte", "val_bits_per_byte"):
        assert metrics(run, column) == metrics(whole, column) != {}


def test_bf16_true_trains_bfloat16_weights_and_goes_on_to_the_same_end(tmp_path: Path) -> None:
    with pytest.raises(InterruptionError):
        fit(tmp_path, more=interrupted_at(5), trainer__precision="bf16-true")
    run = fit(tmp_path, trainer__precision="bf16-true")
    weights = weights_after(run)
    assert {w.dtype for name, w in weights.items() if not name.endswith(".scale")} == {torch.bfloat16}
    assert same(weights, weights_after(fit(tmp_path, name="whole", trainer__precision="bf16-true")))
    # Losses are float32: in bfloat16 all that lie near 8 would be multiples of 1/32.
    losses = metrics(run, "train_bits_per_byte").values()
    assert any(loss * 32 % 1 for loss in (value * math.log(2) for value in losses))


def test_checkpointed_activations_give_the_same_gradients_from_less_memory() -> None:
    tokens = torch.randint(256, (2, 33), generator=torch.Generator().manual_seed(0))
    gradients, kept, forwards = [], [], []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        module = LanguageModel(
            32, embed_dim=16, num_layers=3, num_heads=2, dropout=0.1, checkpoint_activations=checkpointed
        )
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        for layer in module.transformer.layers:
            layer.register_forward_pre_hook(count)
        sizes: list[int] = []

        def keep(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = module.loss(tokens)
        loss.backward()
        gradients.append([p.grad for p in module.parameters()])
        kept.append(sum(sizes))
        forwards.append(calls)
    assert same(*gradients)
    assert forwards == [3, 6]
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("schedule", ["linear", "constant", "wsd"])
@pytest.mark.parametrize(("warmup", "steps"), [(5, 40), (1, 10), (10, 10), (20, 10), (9, 10)])
def test_the_learning_rate_follows_its_schedule(schedule: Any, warmup: int, steps: int) -> None:
    peak = 2e-3
    module = LanguageModel(
        16, embed_dim=16, num_layers=1, num_heads=2, learning_rate=peak, warmup_steps=warmup, schedule=schedule
    )
    optimizer, scheduler = optimizer_of(module, steps)
    rates = []
    for _ in range(steps + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    decay = {"linear": steps - warmup, "constant": 0, "wsd": min(round(steps / 5), steps - warmup)}[schedule]

    def expected(step: int) -> float:
        if step < warmup:
            return peak * (1 + step * (1 - 1 / (warmup + 1)) * (warmup + 1) / warmup) / (warmup + 1)
        left = (steps - step) / decay if decay > 0 else 1
        return peak * (1 if left >= 1 else 0.1 + 0.9 * left)

    rounding = 8 * steps * torch.finfo(torch.float64).eps
    assert rates == pytest.approx([expected(step) for step in range(steps + 1)], rel=rounding)


class KeepWeights(L.Callback):
    """Keeps a weight after every step of the last training."""

    after: list[torch.Tensor] = []  # noqa: RUF012

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        KeepWeights.after.append(pl_module.transformer.norm.weight.detach().clone())


def test_averaged_weights_are_the_moving_average_and_survive_an_interruption(tmp_path: Path) -> None:
    average = extra("lightning.pytorch.callbacks.EMAWeightAveraging", decay=0.5)
    KeepWeights.after = []
    whole = fit(tmp_path, name="whole", more=(*average, "--trainer.callbacks+=test_training_options.KeepWeights"))
    expected = KeepWeights.after[0]
    for weight in KeepWeights.after[1:]:
        expected = expected + (weight - expected) * 0.5
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(weights_after(whole)["transformer.norm.weight"], expected, rtol=8 * eps, atol=0)
    with pytest.raises(InterruptionError):
        fit(tmp_path, more=(*average, *interrupted_at(5)))
    assert same(weights_after(fit(tmp_path, more=average)), weights_after(whole))
    main(["test", *options(tmp_path), *average])


# --- what it shows ---------------------------------------------------------------------------------------------------


def test_samples_are_printed_and_logged_and_change_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fit(tmp_path, more=extra("SampleText", prompt="to be", max_new_tokens=7), model__dropout=0.1)
    printed = capsys.readouterr().out
    assert re.findall(r"--- sample after step (\d+)\nto be", printed) == ["4", "8"]
    (events,) = run.glob("tensorboard/events.*")
    assert events.read_bytes().count(b"to be") == 2
    assert same(weights_after(run), weights_after(fit(tmp_path, name="silent", model__dropout=0.1)))


def test_a_sample_is_text_whatever_the_tokens_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(
        tmp_path,
        more=extra("SampleText", prompt="to be", max_new_tokens=7),
        data__tokenizer="bpe",
        data__tokenizer_size=270,
    )
    assert re.findall(r"--- sample after step (\d+)\nto be", capsys.readouterr().out) == ["4", "8"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": ""}, "SampleText.prompt must have at least one character, got none"),
        ({"temperature": -1.0}, "SampleText: temperature must be 0 or above"),
    ],
)
def test_a_wrong_sample_is_told_in_one_line(
    wrong: dict[str, Any], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert message in complaint(["fit", *options(tmp_path), *extra("SampleText", **wrong)], capfd)


def test_the_throughput_is_that_of_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 0.5
        return now

    monkeypatch.setattr("train.callbacks.time", SimpleNamespace(monotonic=clock))
    run = fit(tmp_path, more=extra("Throughput"), trainer__log_every_n_steps=2)
    # Two steps of two windows of 16; the clock is read at the start of each measure and at its end, 0.5 later. A
    # validation reads it twice, when it starts and when the next step does: 0.5 that is taken off again, and 0.5 more.
    speeds = metrics(run, "tokens_per_second")
    assert speeds.keys() == {1, 3, 5, 7}
    assert speeds[1] == speeds[3] == 2 * 2 * 16 / 0.5
    assert speeds[5] == 2 * 2 * 16 / 1.0


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 1, "tie_embeddings": False}])
def test_the_flops_of_a_step_are_those_that_are_counted(options: dict[str, Any]) -> None:
    model, n = Transformer(50, 32, 2, 4, **options), 24
    tokens = torch.randint(50, (1, n))
    with FlopCounterMode(display=False) as counter:
        cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    counts = counter.get_flop_counts()["Global"]
    linear = sum(count for operation, count in counts.items() if "attention" not in str(operation))
    scores = 3 * 2 * 4 * 4 * 8 * n / 2  # 2 layers, 4 heads of 8; 4 = two products of two operations; half is causal
    assert training_flops(model, n) * n == pytest.approx(linear + scores * n)
    model.block_size = 2
    assert training_flops(model, n) == pytest.approx(linear / n + scores * 3 / (n / 2))
    model.block_size = [2, None]
    assert training_flops(model, n) == pytest.approx(linear / n + scores / 2 * 3 / (n / 2) + scores / 2)


# --- what YAML may not do --------------------------------------------------------------------------------------------

FORBIDDEN = ("os.system", "subprocess.Popen")
PLACES: dict[str, dict[str, Any]] = {
    "model.positions": {"option": "model__positions"},
    "trainer.callbacks": {"option": "trainer__callbacks"},
    "trainer.logger": {"option": "trainer__logger"},
    "trainer.plugins": {"option": "trainer__plugins"},
    "trainer.strategy": {"option": "trainer__strategy"},
    "trainer.profiler": {"option": "trainer__profiler"},
}


@pytest.mark.parametrize("form", ["{name}", '{{"class_path": "{name}", "init_args": {{"args": "touch {harm}"}}}}'])
@pytest.mark.parametrize("name", FORBIDDEN)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_no_option_calls_what_it_was_not_made_for(
    place: dict[str, str], name: str, form: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    harm = tmp_path / "harm"
    changes = {place["option"]: form.format(name=name, harm=harm)}
    if place["option"] == "trainer__callbacks":
        changes = SHIPPED_CALLBACKS | changes
    line = complaint(["fit", *options(tmp_path, **changes)], capfd)
    if place["option"] == "model__positions":
        assert f"Importing '{name}' is not allowed" in line
    assert place["option"].replace("__", ".") in line or "trainer: " in line or "profiler" in line
    assert not harm.exists()
    assert not (tmp_path / "runs").exists()


def test_a_logger_that_is_not_installed_is_told_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for module, logger in (("wandb", "WandbLogger"), ("mlflow", "MLFlowLogger")):
        if module not in sys.modules:
            name = f"lightning.pytorch.loggers.{logger}"
            line = complaint(["fit", *options(tmp_path, trainer__logger=name)], capfd)
            assert line.startswith(f"{name} cannot be made: ")
            assert module in line


def test_another_logger_is_a_line_of_yaml(tmp_path: Path) -> None:
    name = "lightning.pytorch.loggers.CSVLogger"
    run = fit(tmp_path, trainer__logger=name, trainer__logger__save_dir=tmp_path / "logs", trainer__max_steps=2)
    assert not list(run.glob("tensorboard/*"))
    (log,) = tmp_path.glob("logs/**/metrics.csv")
    assert "train_bits_per_byte" in log.read_text()


@pytest.mark.parametrize("group", ["hyper_parameters", "datamodule_hyper_parameters"])
def test_a_checkpoint_calls_nothing_that_it_names(
    group: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = fit(tmp_path, trainer__max_steps=1) / "checkpoints" / "last.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    content[group]["_instantiator"] = "os.execv"
    torch.save(content, checkpoint)
    for command in ("validate", "fit"):
        line = complaint([command, *options(tmp_path, trainer__max_steps=1)], capfd)
        assert line == f"{checkpoint} is no checkpoint of this trainer: it wants 'os.execv' called"
