"""What a trained model is for: samples, exports, and what callbacks show on the way."""

import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import tokenizers
import torch
from tiny import (
    CONFIGS,
    LAST,
    InterruptionError,
    Recorder,
    complaint_of,
    fit,
    interrupted_at,
    metrics,
    options,
    read_checkpoint,
    same,
    snapshot,
)
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from train.__main__ import main
from train.callbacks import training_flops
from train.checkpoint import FREE
from train.errors import UserError, command
from train.export import export
from train.language_model import LanguageModel
from train.runs import find_runs
from train.sample import sample
from xpos_zoo import XPOS, RotaryEmbedding, Transformer

TOKENS = torch.randint(256, (2, 140), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def of_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with tokens of a tokenizer.json."""
    folder = tmp_path_factory.mktemp("words")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"to": 0, "be": 1, "or": 2, "?": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return fit(folder, trainer__max_steps=2, data__tokenizer=folder / "tokenizer.json")


def sampled(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    capsys.readouterr()
    command(sample, [str(arg) for arg in args])
    return capsys.readouterr().out


@pytest.mark.parametrize(("given", "block_size"), [((), 8), (("--block_size", 5), 5), (("--block_size", 0), None)])
def test_the_text_is_what_the_model_generates_from_the_prompt(given, block_size, trained, capsys):
    """In blocks of half the trained length unless said otherwise."""
    args = ("--prompt", "to be é", "--max_new_tokens", 60, "--temperature", 0, *given)
    text = sampled(capsys, "--checkpoint", trained, *args)
    model = LanguageModel.load_from_checkpoint(trained / LAST, weights_only=True).transformer.eval()
    model.block_size = block_size
    tokens = model.generate(torch.tensor([list("to be é".encode())]), 60, temperature=0)
    expected = bytes(tokens[0].tolist()).decode(errors="replace")
    assert text.endswith("\n")
    assert expected.startswith(text[:-1])
    assert set(expected[len(text) - 1 :]) <= {"�"}  # the beginning of a character


def test_the_same_seed_gives_the_same_text_of_any_tokens(trained, of_words, capsys):
    for run in (trained, of_words):
        checkpoints = (run, run / LAST, run)
        texts = [
            sampled(capsys, "--checkpoint", checkpoint, "--seed", seed, "--max_new_tokens", 40, "--prompt", "to be")
            for checkpoint, seed in zip(checkpoints, (1, 1, 2), strict=True)
        ]
        assert texts[0] == texts[1] != texts[2]
        assert texts[0].startswith("to be")


def test_text_that_is_stopped_ends_where_it_is(trained, capsys, monkeypatch):
    def interrupted(*_: Any, **__: Any) -> Any:
        yield torch.tensor([ord("a")])
        raise KeyboardInterrupt

    monkeypatch.setattr(Transformer, "stream", interrupted)
    assert sampled(capsys, "--checkpoint", trained, "--prompt", "x") == "xa\n"


@pytest.mark.slow
def test_a_reader_that_has_had_enough_ends_the_text_without_a_word(trained):
    command = [sys.executable, "-m", "train.sample", "--checkpoint", str(trained), "--max_new_tokens", "3000"]
    with subprocess.Popen(command, cwd=CONFIGS.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def exported(run: Path, folder: Path, *args: str) -> Transformer:
    command(export, [f"--checkpoint={run}", f"--output={folder}", *args])
    return Transformer.from_pretrained(folder)


def test_the_exported_model_gives_the_trained_ones_logits_and_takes_its_tokenizer_along(trained, of_words, tmp_path):
    for run in (trained, of_words):
        model = LanguageModel.load_from_checkpoint(run / LAST, weights_only=True).transformer.eval()
        tokens = TOKENS % model.config.vocab_size
        assert torch.equal(exported(run, tmp_path / run.parts[-4])(tokens), model(tokens))
        tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / run.parts[-4] / "tokenizer.json"))
        assert tokenizer.to_str() == read_checkpoint(run)["TextData"]["tokenizer"]
    assert [p.scale_base for p in exported(trained, tmp_path / "a").modules() if isinstance(p, XPOS)] == [8.0]


def test_an_exported_model_is_sampled_and_measured_as_its_run(trained, tmp_path, capsys):
    exported(trained, tmp_path / "a")
    capsys.readouterr()
    texts = []
    for where in (trained, tmp_path / "a"):
        command(sample, [f"--checkpoint={where}", "--seed=1", "--max_new_tokens=40"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    (run,), (ours,) = find_runs([trained]), find_runs([tmp_path / "a"])
    assert replace(ours, checkpoint=run.checkpoint, sha256=run.sha256, data=run.data) == run
    assert ours.data.items() == {name: value for name, value in run.data.items() if name not in FREE}.items()
    (tmp_path / "a" / "training.json").write_text("{}")
    with pytest.raises(UserError, match=r"training\.json is damaged"):
        find_runs([tmp_path / "a"])


def test_the_block_size_can_be_set_and_nothing_is_overwritten_unasked(trained, tmp_path, capfd):
    assert exported(trained, tmp_path / "a", "--block_size=8").block_size == 8
    before = snapshot(tmp_path)
    line = complaint_of(partial(command, export), [f"--checkpoint={trained}", f"--output={tmp_path / 'a'}"], capfd)
    assert line == f"{tmp_path / 'a' / 'tokenizer.json'} exists; give another path, or --overwrite true"
    assert snapshot(tmp_path) == before
    assert exported(trained, tmp_path / "a", "--block_size=0", "--overwrite=true").block_size is None


def test_the_hybrid_of_the_documentation_is_trained_in_bfloat16_and_exported(tmp_path):
    documentation = (CONFIGS.parent / "docs" / "training.md").read_text()
    (example,) = re.findall(r"```yaml\n(model:\n.*?)```", documentation, re.DOTALL)
    (tmp_path / "hybrid.yaml").write_text(example)
    config: dict[str, Any] = {"model__num_layers": None, "trainer__precision": "bf16-true", "name": "hybrid"}
    run = fit(tmp_path, more=("--config", str(tmp_path / "hybrid.yaml")), trainer__max_steps=2, **config)
    model = exported(run, tmp_path / "model")
    assert model.block_size == [32, 32, 32, None]
    *local, last = (attention.positions for attention in model.attentions)
    assert [type(positions) for positions in local] == [XPOS] * 3
    assert isinstance(last, RotaryEmbedding)
    assert last.max_wavelength == 128
    state = model.state_dict()
    for name, weight in read_checkpoint(run)["state_dict"].items():
        assert torch.equal(state[name.removeprefix("transformer.")], weight), name


def extra(callback: str, init_args: str = "{}") -> tuple[str, ...]:
    return (f'--trainer.callbacks+={{"class_path": "{callback}", "init_args": {init_args}}}',)


def test_accumulated_batches_make_the_clipped_gradient_of_them_all(tmp_path):
    more: dict[str, Any] = {"trainer__val_check_interval": 3, "trainer__max_steps": 1}
    run = fit(tmp_path, more=extra("tiny.Recorder"), trainer__accumulate_grad_batches=3, **more)
    assert [len(batch) for batch in Recorder.batches] == [2, 2, 2]
    L.seed_everything(1)
    module = LanguageModel(16, embed_dim=16, num_layers=1, num_heads=2)
    cross_entropy(*module.predictions(torch.cat(Recorder.batches))).backward()
    parameters = list(module.parameters())
    ours = [p.grad for p in parameters if p.ndim >= 2] + [p.grad for p in parameters if p.ndim < 2]
    norm = float(torch.cat([gradient.flatten() for gradient in ours if gradient is not None]).norm())
    # AdamW's first moment after one step is (1 - beta1) = 0.1 times the gradient that it was given.
    states = read_checkpoint(run)["optimizer_states"][0]["state"].values()
    for state, gradient in zip(states, ours, strict=True):
        assert gradient is not None
        clipped = gradient * min(1.0, 1.0 / norm)  # configs/cpu.yaml's gradient_clip_val
        torch.testing.assert_close(state["exp_avg"] / 0.1, clipped, rtol=1e-4, atol=1e-6 * norm)


@pytest.mark.slow
def test_averaged_weights_are_what_a_checkpoint_holds_and_survive_an_interruption(tmp_path, trained):
    average = extra("lightning.pytorch.callbacks.EMAWeightAveraging", '{"decay": 0.5}')
    weights = read_checkpoint(fit(tmp_path, name="whole", more=average))["state_dict"]
    assert not same(weights, read_checkpoint(trained)["state_dict"])
    with pytest.raises(InterruptionError):
        fit(tmp_path, more=(*average, *interrupted_at(5)))
    assert same(read_checkpoint(fit(tmp_path, more=average))["state_dict"], weights)
    main(["test", *options(tmp_path), *average])


def test_samples_and_throughput_are_logged_and_change_nothing(tmp_path, capsys):
    shown = extra("SampleText", '{"prompt": "to be", "max_new_tokens": 7}')
    run = fit(tmp_path, more=(*shown, *extra("Throughput", '{"window_size": 4}')), model__dropout=0.1)
    assert re.findall(r"--- sample after step (\d+)\nto be", capsys.readouterr().out) == ["4", "8"]
    (events,) = run.glob("tensorboard/events.*")
    assert events.read_bytes().count(b"to be") == 2
    tokens, windows = (metrics(run, f"train/device/{what}_per_sec") for what in ("items", "samples"))
    assert tokens == {step: pytest.approx(16 * rate) for step, rate in windows.items()} != {}
    silent = fit(tmp_path, name="silent", model__dropout=0.1)
    assert same(read_checkpoint(run)["state_dict"], read_checkpoint(silent)["state_dict"])


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 1, "tie_embeddings": False}])
def test_the_flops_of_a_step_are_those_that_are_counted(options):
    model, n = Transformer(50, 32, 2, 4, **options), 24
    tokens = torch.randint(50, (1, n))
    with FlopCounterMode(display=False) as counter:
        cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    counts = counter.get_flop_counts()["Global"]
    linear = sum(count for operation, count in counts.items() if "attention" not in str(operation))
    scores = 3 * 2 * 4 * 4 * 8 * n / 2  # 2 layers, 4 heads of 8; 4 = two products of two operations; half is causal
    assert training_flops(model, n) * n == pytest.approx(linear + scores * n)
    model.block_size = [2, None]
    assert training_flops(model, n) == pytest.approx(linear / n + scores / 2 * 3 / (n / 2) + scores / 2)
