"""Whatever a user gets wrong ends in one line, with exit status 2, before anything is written.

What upstream libraries say is theirs: only what we check ourselves is asserted in words.
"""

import json
import pickle
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import complaint_of, options, snapshot, write_corpus

from train import export, sample
from train.__main__ import main

complaint = partial(complaint_of, main)
MODEL_PARALLEL = "lightning.pytorch.strategies.ModelParallelStrategy"


WRONG_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "a key that is missing": ({"data__context_length": "null"}, "data.context_length"),
    "a key that there is not": ({"model__embd_dim": 3}, "model.embd_dim"),
    "a word for a number": ({"model__embed_dim": "wide"}, "model.embed_dim"),
    "an encoding's option": ({"model__positions__init_args__scale_bse": 3}, "scale_bse"),
    "a scale_base of what has none": (
        {"model__positions": "RotaryEmbedding", "model__scale_base": 7},
        "model.scale_base is 7, but no layer has XPOS",
    ),
    "a scale_base below 0": ({"model__scale_base": -1}, "scale_base must be above 0 and finite, got -1"),
    "positions of fewer layers": ({"model__positions": '["XPOS", "XPOS"]'}, "positions must be one for all layers or"),
    "a max_wavelength that leaves no pair": ({"model__positions__max_wavelength": 1}, "max_wavelength"),
    "heads that do not divide": ({"model__num_heads": 3}, "embed_dim must be divisible by num_heads=3, got 16"),
    "a module without positions": ({"model__positions": "torch.nn.Identity"}, "model.positions"),
    "no learning rate": ({"model__learning_rate": 0}, "model.learning_rate must be above 0, got 0"),
    "a negative decay": ({"model__weight_decay": -1}, "model.weight_decay must be 0 or above, got -1"),
    "a negative seed": ({"seed_everything": -1}, "seed_everything"),
    "no steps": ({"trainer__max_steps": -1}, "trainer.max_steps must be above 0, got -1"),
    "no saving": ({"save_every": 0}, "save_every"),
    "no such accelerator": ({"trainer__accelerator": "abacus"}, "abacus"),
    "layers that would be split": (
        {"trainer__strategy": MODEL_PARALLEL, "trainer__strategy__data_parallel_size": 2},
        "trainer.strategy.tensor_parallel_size must be 1, got auto",
    ),
    "a checkpoint in pieces": (
        {"trainer__strategy": MODEL_PARALLEL, "trainer__strategy__tensor_parallel_size": 1},
        "trainer.strategy.save_distributed_checkpoint must be False, got True",
    ),
    "a sample without a prompt": (
        {"trainer__callbacks": "SampleText", "trainer__callbacks__prompt": ""},
        "SampleText.prompt must have at least one character, got none",
    ),
    "a logger that is not installed": ({"trainer__logger": "lightning.pytorch.loggers.CometLogger"}, "CometLogger"),
    "a batch of none": ({"data__batch_size": 0}, "data.batch_size must be 1 or above, got 0"),
    "a fraction above a half": ({"data__val_fraction": 0.5}, "data.val_fraction must be between 0 and 0.5, got 0.5"),
    "two sources": ({"data__dataset": "some/set"}, "data.dataset and data.paths are two sources; give one"),
    "no such folder": ({"data__paths": "[nowhere]"}, "data.paths: there is no file or folder 'nowhere'"),
    "no paths": ({"data__paths": "[]"}, "there is no document with UTF-8 text"),
    "no such tokenizer": ({"data__tokenizer": "words"}, "data.tokenizer must be bytes or the path of a tokenizer.json"),
    "no tokenizer file": ({"data__tokenizer": "no.json"}, "data.tokenizer: no.json cannot be read"),
    "a checkpoint that there is not": (
        {"checkpoint": "nowhere.ckpt"},
        "there is no checkpoint nowhere.ckpt; `python -m train fit` writes one",
    ),
}


@pytest.mark.parametrize(("changes", "message"), WRONG_OPTIONS.values(), ids=WRONG_OPTIONS.keys())
def test_a_wrong_option(changes, message, tmp_path, capfd):
    assert message in complaint(["fit", *options(tmp_path, **changes)], capfd)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("content", [None, "- 3", "model: [", "trainer:\n  max_step: 3", "data: nowhere.yaml"])
def test_a_wrong_configuration_file(content, tmp_path, capfd):
    path = tmp_path / "wrong.yaml"
    if content is not None:
        path.write_text(content)
    assert complaint(["fit", "--config", str(path), *options(tmp_path)[2:]], capfd)
    assert not (tmp_path / "runs").exists()


WRONG_TEXTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an empty folder": (lambda folder: None, "data.paths: there is no file in "),
    "no text": (lambda folder: (folder / "a.png").write_bytes(b"\x89PNG\r\n"), "there is no document with UTF-8 text"),
    "less than a window": (
        lambda folder: write_corpus(folder, size=2),
        "less than one window of data.context_length + 1 = 101; give more text, or lower data.context_length",
    ),
    "a record without the field": (
        lambda folder: (folder / "a.jsonl").write_text(json.dumps({"body": "text"}) + "\n"),
        "a.jsonl has no 'text', but 'body'",
    ),
    "a record of numbers": (
        lambda folder: (folder / "a.jsonl").write_text(json.dumps({"text": 3}) + "\n"),
        "data.field: 'text' must be text, ",
    ),
    "damaged JSON": (lambda folder: (folder / "a.jsonl").write_text('{"text": "a"}\nno\n'), "a.jsonl cannot be read"),
    "damaged Parquet": (lambda folder: (folder / "a.parquet").write_text("no"), "a.parquet cannot be read"),
    "damaged gzip": (lambda folder: (folder / "a.txt.gz").write_bytes(b"\x1f\x8b no"), "a.txt.gz cannot be read"),
}


@pytest.mark.parametrize(("write", "message"), WRONG_TEXTS.values(), ids=WRONG_TEXTS.keys())
def test_a_wrong_text(write, message, tmp_path, capfd):
    (tmp_path / "corpus").mkdir()
    write(tmp_path / "corpus")
    assert message in complaint(["fit", *options(tmp_path, data__context_length=100)], capfd)
    assert not (tmp_path / "runs").exists()


# --- checkpoints -----------------------------------------------------------------------------------------------------


class Harmful:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harmed"),))


def change(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def changed(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        edit(content)
        torch.save(content, path)

    return changed


WRONG_CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:1000]), "is no checkpoint, or a damaged one: give "),
    "empty": (lambda path: path.write_bytes(b""), "is no checkpoint, or a damaged one"),
    "a pickle of code": (lambda path: path.write_bytes(pickle.dumps(Harmful())), "is no checkpoint, or a damaged one"),
    "code in a checkpoint": (lambda path: torch.save({"a": Harmful()}, path), "is no checkpoint, or a damaged one"),
    "a tensor": (lambda path: torch.save(torch.ones(2), path), "is no checkpoint of this trainer: one holds "),
    "another program's": (change(lambda c: c.pop("hyper_parameters")), "is no checkpoint of this trainer: one holds "),
    "one that names a function": (
        change(lambda c: c["hyper_parameters"].update(_instantiator="os.execv")),
        "is no checkpoint of this trainer: it wants 'os.execv' called",
    ),
}


@pytest.mark.parametrize(("damage", "message"), WRONG_CHECKPOINTS.values(), ids=WRONG_CHECKPOINTS.keys())
def test_a_damaged_checkpoint(damage, message, trained, tmp_path, capfd):
    checkpoint = tmp_path / "damaged.ckpt"
    checkpoint.write_bytes((trained / "checkpoints" / "last.ckpt").read_bytes())
    damage(checkpoint)
    before = snapshot(tmp_path)
    for command, args in (
        (main, ["fit", *options(tmp_path / "home", checkpoint=checkpoint)]),
        (main, ["test", *options(tmp_path / "home", checkpoint=checkpoint)]),
        (sample.main, ["--checkpoint", str(checkpoint)]),
        (export.main, ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "exported")]),
    ):
        line = complaint_of(command, args, capfd)
        assert str(checkpoint) in line
        assert message in line
    assert before.items() <= snapshot(tmp_path).items()
    assert not (tmp_path / "home" / "runs").exists()
    assert not (tmp_path / "exported").exists()
    assert not Path("harmed").exists()


OTHER_MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "width": ({"model__embed_dim": 32}, "model.embed_dim: 16 there, 32 here"),
    "its default": ({"data__context_length": 32}, "model.scale_base: 8.0 there, 16.0 here"),
    "frequencies": ({"model__positions__base": 99}, "model.positions.init_args.base: 10000.0 there, 99.0 here"),
}


@pytest.mark.parametrize(("changes", "message"), OTHER_MODELS.values(), ids=OTHER_MODELS.keys())
def test_a_checkpoint_of_another_model(changes, message, trained, tmp_path, capfd):
    for command in ("fit", "test"):
        assert message in complaint([command, *options(tmp_path, checkpoint=trained, **changes)], capfd)
    assert not (tmp_path / "runs").exists()


def test_weights_alone_and_another_tokenizer(trained, tmp_path, capfd):
    checkpoint = tmp_path / "changed.ckpt"
    checkpoint.write_bytes((trained / "checkpoints" / "last.ckpt").read_bytes())
    change(lambda content: content["TextData"].update(tokenizer="another"))(checkpoint)
    line = complaint(["test", *options(tmp_path, checkpoint=checkpoint)], capfd)
    assert line == f"{checkpoint} belongs to another tokenizer than bytes (data.tokenizer)"
    change(lambda content: content.pop("optimizer_states"))(checkpoint)
    line = complaint(["fit", *options(tmp_path, checkpoint=checkpoint)], capfd)
    assert line == f"{checkpoint} holds weights alone; training goes on only with the optimizer's state"


# --- what YAML may not do --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["{name}", '{{"class_path": "{name}", "init_args": {{"args": "touch {harm}"}}}}'])
@pytest.mark.parametrize("name", ["os.system", "subprocess.Popen"])
@pytest.mark.parametrize("place", ["model__positions", "trainer__callbacks", "trainer__logger", "trainer__strategy"])
def test_no_option_calls_what_it_was_not_made_for(place, name, form, tmp_path, capfd):
    harm = tmp_path / "harm"
    assert complaint(["fit", *options(tmp_path, **{place: form.format(name=name, harm=harm)})], capfd)
    assert not harm.exists()
    assert not (tmp_path / "runs").exists()


# --- sample and export -----------------------------------------------------------------------------------------------

WRONG_SAMPLES: dict[str, tuple[list[str], str]] = {
    "no prompt": (["--prompt", ""], "prompt must have at least one token, got ''"),
    "half a character": (["--prompt", "\udc80"], "prompt must be valid UTF-8"),
    "a device that there is not": (["--device", "abacus"], "device must be cpu"),
    "a negative temperature": (["--temperature", "-1"], "temperature must be 0 or above"),
    "no tokens": (["--max_new_tokens", "-1"], "max_new_tokens must be 0 or above, got -1"),
    "a word for a number": (["--top_k", "few"], "top_k"),
}


@pytest.mark.parametrize(("args", "message"), WRONG_SAMPLES.values(), ids=WRONG_SAMPLES.keys())
def test_a_wrong_sample(args, message, trained, capfd):
    if args[1] == "\udc80" and sys.platform == "win32":
        pytest.skip("Windows' arguments are UTF-16")
    assert message in complaint_of(sample.main, ["--checkpoint", str(trained), *args], capfd)
