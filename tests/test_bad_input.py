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
from tiny import LAST, complaint_of, options, snapshot, write_corpus

from train.__main__ import main
from train.errors import command
from train.export import export
from train.sample import sample

complaint, sampling = partial(complaint_of, main), partial(command, sample)
MODEL_PARALLEL = "lightning.pytorch.strategies.ModelParallelStrategy"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__context_length": "null"}, "data.context_length"),
        ({"model__embd_dim": 3}, "model.embd_dim"),
        ({"model__embed_dim": "wide"}, "model.embed_dim"),
        ({"model__positions__init_args__scale_bse": 3}, "scale_bse"),
        (
            {"model__positions": "RotaryEmbedding", "model__scale_base": 7},
            "model.scale_base is 7, but no layer has XPOS",
        ),
        ({"model__scale_base": -1}, "scale_base must be above 0 and finite, got -1"),
        ({"model__positions": '["XPOS", "XPOS"]'}, "positions must be one for all layers or"),
        ({"model__positions": "torch.nn.Identity"}, "model.positions"),
        (
            {"model__distance_bias": "{name: ALiBi, num_heads: 3}"},
            "model.num_heads is 2, but a distance bias is made for 3",
        ),
        (
            {"model__distance_bias": "{class_path: study.Steep}"},
            "must have the import path of a class, got 'study.Steep'",
        ),
        ({"model__distance_bias": "{name: Steep}"}, "distance_bias must be a mapping with the name"),
        ({"model__distance_bias": "{name: ScaleInvariant, tau: 0}"}, "tau must be above 0 and finite, got 0"),
        ({"model__learning_rate": 0}, "model.learning_rate must be above 0 and finite, got 0"),
        ({"model__context_parallel_size": 0}, "model.context_parallel_size must divide the devices, 1, got 0"),
        (
            {"model__context_parallel_size": 2, "model__block_size": 4},
            "model.context_parallel_size must divide the devices, 1, got 2",
        ),
        (
            {"model__context_parallel_size": 2, "model__block_size": 5},
            "model.context_parallel_size * model.window_size, got 16 with 2, 5 and null",
        ),
        (
            {"model__context_parallel_size": 2, "model__window_size": 9},
            "model.context_parallel_size * model.window_size, got 16 with 2, null and 9",
        ),
        ({"model__block_size": 8, "model__window_size": 4}, "block_size or window_size must be None, got 8 and 4"),
        ({"model__output_gate": 2}, "model.output_gate"),
        ({"trainer__max_steps": -1}, "trainer.max_steps must be above 0, got -1"),
        ({"trainer__limit_train_batches": 3}, "trainer.limit_train_batches must be null, got 3: training draws random"),
        ({"trainer__limit_train_batches": 1}, "trainer.limit_train_batches must be null, got 1: "),
        ({"trainer__overfit_batches": 2}, "trainer.overfit_batches must be 0, got 2: "),
        ({"trainer__max_epochs": 2}, "trainer.max_epochs must be null, got 2: "),
        ({"trainer__check_val_every_n_epoch": 2}, "trainer.check_val_every_n_epoch must be null, got 2: "),
        ({"trainer__use_distributed_sampler": "true"}, "trainer.use_distributed_sampler must be False, got True: "),
        ({"trainer__accumulate_grad_batches": 0}, "trainer.accumulate_grad_batches must be 1 or above, got 0"),
        ({"trainer__gradient_clip_val": -1}, "trainer.gradient_clip_val must be 0 or above, got -1"),
        ({"trainer__val_check_interval": 0}, "trainer.val_check_interval must be above 0, got 0"),
        (
            {"trainer__val_check_interval": 9, "trainer__check_val_every_n_epoch": 1},
            "trainer.val_check_interval must be at most the training's 8 batches, got 9; or set trainer.check_val",
        ),
        ({"model__embed_dim": 10**10}, "allocate memory"),
        ({"save_every": 0}, "save_every"),
        ({"trainer__accelerator": "abacus"}, "abacus"),
        (
            {"trainer__strategy": MODEL_PARALLEL, "trainer__strategy__data_parallel_size": 2},
            "trainer.strategy.tensor_parallel_size must be 1, got auto",
        ),
        (
            {"trainer__strategy": MODEL_PARALLEL, "trainer__strategy__tensor_parallel_size": 1},
            "trainer.strategy.save_distributed_checkpoint must be False, got True",
        ),
        (
            {"trainer__callbacks": "SampleText", "trainer__callbacks__prompt": ""},
            "SampleText.prompt must have at least one character, got none",
        ),
        ({"trainer__logger": "lightning.pytorch.loggers.CometLogger"}, "CometLogger"),
        ({"data__batch_size": 0}, "data.batch_size must be 1 or above, got 0"),
        ({"data__val_fraction": 0.5}, "data.val_fraction must be between 0 and 0.5, got 0.5"),
        ({"data__dataset": "some/set"}, "data.dataset and data.paths are two sources; give one"),
        ({"data__paths": "[nowhere]"}, "data.paths: there is no file or folder 'nowhere'"),
        ({"data__paths": "[]"}, "there is no document with UTF-8 text"),
        ({"data__tokenizer": "words"}, "data.tokenizer must be bytes or the path of a tokenizer.json"),
        ({"checkpoint": "nowhere.ckpt"}, "there is no checkpoint nowhere.ckpt; `python -m train fit` writes one"),
    ],
)
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
        "a.jsonl, line 1 has no 'text', but 'body'",
    ),
    "a record of numbers": (
        lambda folder: (folder / "a.jsonl").write_text(json.dumps({"text": 3}) + "\n"),
        "data.field: 'text' must be text, ",
    ),
    "damaged JSON": (
        lambda folder: (folder / "a.jsonl").write_text('{"text": "a"}\n\nno\n{"text": "b"}\n'),
        "a.jsonl, line 3 cannot be read: Expecting value",
    ),
    "JSON that is no object": (
        lambda folder: (folder / "a.jsonl").write_text('["text"]'),
        "a.jsonl, line 1 cannot be read: it is no JSON object",
    ),
    "damaged Parquet": (lambda folder: (folder / "a.parquet").write_text("no"), "a.parquet cannot be read"),
    "damaged gzip": (lambda folder: (folder / "a.txt.gz").write_bytes(b"\x1f\x8b no"), "a.txt.gz cannot be read"),
}


@pytest.mark.parametrize(("write", "message"), WRONG_TEXTS.values(), ids=WRONG_TEXTS.keys())
def test_a_wrong_text(write, message, tmp_path, capfd):
    (tmp_path / "corpus").mkdir()
    write(tmp_path / "corpus")
    assert message in complaint(["fit", *options(tmp_path, data__context_length=100)], capfd)
    assert not (tmp_path / "runs").exists()


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


@pytest.mark.slow
@pytest.mark.parametrize(("damage", "message"), WRONG_CHECKPOINTS.values(), ids=WRONG_CHECKPOINTS.keys())
def test_a_damaged_checkpoint(damage, message, trained, tmp_path, capfd):
    checkpoint = tmp_path / "damaged.ckpt"
    checkpoint.write_bytes((trained / LAST).read_bytes())
    damage(checkpoint)
    before = snapshot(tmp_path)
    for work, args in (
        (main, ["fit", *options(tmp_path / "home", checkpoint=checkpoint)]),
        (main, ["test", *options(tmp_path / "home", checkpoint=checkpoint)]),
        (sampling, ["--checkpoint", str(checkpoint)]),
        (partial(command, export), ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "exported")]),
    ):
        line = complaint_of(work, args, capfd)
        assert str(checkpoint) in line
        assert message in line
    assert before.items() <= snapshot(tmp_path).items()
    assert not (tmp_path / "home" / "runs").exists()
    assert not (tmp_path / "exported").exists()
    assert not Path("harmed").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__embed_dim": 32}, "model.embed_dim: 16 there, 32 here"),
        ({"data__context_length": 32}, "model.positions.init_args.scale_base: 8.0 there, 16.0 here"),
        ({"model__positions__scale_base": 512}, "scale_base: 8.0 there, 512.0 here"),
        ({"model__positions__base": 99}, "model.positions.init_args.base: 10000.0 there, 99.0 here"),
    ],
)
def test_a_checkpoint_of_another_model(changes, message, trained, tmp_path, capfd):
    for work in ("fit", "test"):
        assert message in complaint([work, *options(tmp_path, checkpoint=trained, **changes)], capfd)
    assert not (tmp_path / "runs").exists()


def test_weights_alone_and_another_tokenizer(trained, tmp_path, capfd):
    checkpoint = tmp_path / "changed.ckpt"
    checkpoint.write_bytes((trained / LAST).read_bytes())
    change(lambda content: content["TextData"].update(tokenizer="another"))(checkpoint)
    line = complaint(["test", *options(tmp_path, checkpoint=checkpoint)], capfd)
    assert line == f"{checkpoint} belongs to another tokenizer than bytes (data.tokenizer)"
    change(lambda content: content.pop("optimizer_states"))(checkpoint)
    line = complaint(["fit", *options(tmp_path, checkpoint=checkpoint)], capfd)
    assert line == f"{checkpoint} holds weights alone; training goes on only with the optimizer's state"


@pytest.mark.parametrize("form", ["{name}", '{{"class_path": "{name}", "init_args": {{"args": "touch {harm}"}}}}'])
@pytest.mark.parametrize("name", ["os.system", "subprocess.Popen"])
@pytest.mark.parametrize("place", ["model__positions", "trainer__callbacks", "trainer__logger", "trainer__strategy"])
def test_no_option_calls_what_it_was_not_made_for(place, name, form, tmp_path, capfd):
    harm = tmp_path / "harm"
    assert complaint(["fit", *options(tmp_path, **{place: form.format(name=name, harm=harm)})], capfd)
    assert not harm.exists()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", ""], "prompt must have at least one token, got ''"),
        (["--prompt", "\udc80"], "prompt must be valid UTF-8"),
        (["--device", "abacus"], "device must be cpu"),
        (["--temperature", "-1"], "temperature must be 0 or above"),
        (["--max_new_tokens", "-1"], "max_new_tokens must be 0 or above and an integer, got -1"),
        (["--top_k", "few"], "top_k"),
    ],
)
def test_a_wrong_sample(args, message, trained, capfd):
    if args[1] == "\udc80" and sys.platform == "win32":
        pytest.skip("Windows' arguments are UTF-16")
    assert message in complaint_of(sampling, ["--checkpoint", str(trained), *args], capfd)
