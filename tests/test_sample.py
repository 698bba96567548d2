"""`python -m train.sample`: text from a trained model."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import CONFIGS, complaint_of, fit

from train import sample as module
from train.language_model import LanguageModel
from train.sample import main
from xpos_zoo import Transformer

ROOT = CONFIGS.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(tmp_path_factory.mktemp("sampled"), trainer__max_steps=2)


def printed(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    capsys.readouterr()
    main([str(arg) for arg in args])
    return capsys.readouterr().out


def test_the_text_is_what_the_model_generates_from_the_prompt(run, capsys):
    checkpoint = run / "checkpoints" / "last.ckpt"
    text = printed(
        capsys, "--checkpoint", checkpoint, "--prompt", "to be é", "--max_new_tokens", 60, "--temperature", 0
    )
    model = LanguageModel.load_from_checkpoint(checkpoint, weights_only=True).transformer.eval()
    model.block_size = 8  # half the trained length of 16
    tokens = model.generate(torch.tensor([list("to be é".encode())]), 60, temperature=0)
    assert text == bytes(tokens[0].tolist()).decode(errors="replace") + "\n"


def test_a_run_folder_stands_for_its_last_checkpoint(run, capsys):
    options = ("--seed", 1, "--max_new_tokens", 30)
    assert printed(capsys, "--checkpoint", run, *options) == printed(
        capsys, "--checkpoint", run / "checkpoints" / "last.ckpt", *options
    )


def test_the_same_seed_gives_the_same_text_and_another_another(run, capsys):
    texts = [printed(capsys, "--checkpoint", run, "--seed", seed, "--max_new_tokens", 40) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(("given", "used"), [((), 8), (("--block_size", 5), 5), (("--block_size", 0), None)])
def test_blocks_are_half_the_trained_length_unless_said_otherwise(given, used, run, capsys, monkeypatch):
    used_sizes = []
    stream = Transformer.stream
    monkeypatch.setattr(
        Transformer, "stream", lambda self, *a, **k: used_sizes.append(self.block_size) or stream(self, *a, **k)
    )
    printed(capsys, "--checkpoint", run, "--max_new_tokens", 1, *given)
    assert used_sizes == [used]


def test_trained_blocks_stay_unless_said_otherwise(tmp_path, capsys, monkeypatch):
    used_sizes, generate = [], Transformer.stream
    monkeypatch.setattr(
        Transformer, "stream", lambda self, *a, **k: used_sizes.append(self.block_size) or generate(self, *a, **k)
    )
    hybrid = fit(tmp_path, model__num_layers=2, model__block_size="[4, null]", trainer__max_steps=1)
    for given in ((), ("--block_size", 5)):
        printed(capsys, "--checkpoint", hybrid, "--max_new_tokens", 1, *given)
    assert used_sizes == [[4, 8], 5]


def test_text_that_is_stopped_ends_where_it_is(run, capsys, monkeypatch):
    class Interrupted(LanguageModel):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.transformer.stream = self.interrupted

        def interrupted(self, *_, **__):
            yield torch.tensor([ord("a")])
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "LanguageModel", Interrupted)
    assert printed(capsys, "--checkpoint", run, "--prompt", "x") == "xa\n"


def test_a_reader_that_has_had_enough_ends_the_text_without_a_word(run):
    command = [sys.executable, "-m", "train.sample", "--checkpoint", str(run), "--max_new_tokens", "3000"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--checkpoint", "{tmp}/none.ckpt"], "there is no checkpoint"),
        (["--checkpoint", "{tmp}"], "there is no checkpoint"),
        (["--checkpoint", "{tmp}/damaged.ckpt"], "is no checkpoint, or a damaged one"),
        (["--checkpoint", "{run}", "--prompt", ""], "prompt must have at least one character, got none"),
        (["--checkpoint", "{run}", "--prompt", "caf\udce9"], r"prompt must be valid UTF-8, got 'caf\udce9'"),
        (["--checkpoint", "{run}", "--temperature", "-1"], "temperature must be 0 or above and finite, got -1.0"),
        (["--checkpoint", "{run}", "--top_k", "0"], "top_k must be 1 or above, got 0"),
        (["--checkpoint", "{run}", "--top_p", "2"], "top_p must be above 0 and at most 1, got 2.0"),
        (["--checkpoint", "{run}", "--max_new_tokens", "-5"], "max_new_tokens must be 0 or above, got -5"),
        (["--checkpoint", "{run}", "--max_new_tokens", "many"], "Expected a <class 'int'>. Got value: many"),
        (["--checkpoint", "{run}", "--block_size", "-8"], "block_size must be above 0 and an integer"),
        (["--checkpoint", "{run}", "--device", "tpu"], "device must be cpu"),
        (["--checkpoint", "{run}", "--promt", "x"], "did you mean prompt?"),
        ([], "checkpoint"),
    ],
)
def test_a_wrong_argument_is_told_in_one_line(args, said, run, tmp_path, capfd):
    (tmp_path / "damaged.ckpt").write_bytes(b"PK")
    assert said in complaint_of(main, [arg.format(run=run, tmp=tmp_path) for arg in args], capfd)
