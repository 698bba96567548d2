"""`python -m train.export`: the exported model is the trained one, and what will not do is told in one line."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pretrained import OwnPositions
from tiny import CONFIGS, complaint_of, fit, read_checkpoint

from train.export import main
from train.extrapolate import extrapolate
from train.language_model import LanguageModel
from train.runs import find_runs
from xpos_zoo import XPOS, RotaryEmbedding, Transformer

pytest.importorskip("safetensors")
complaint = partial(complaint_of, main)
TOKENS = torch.randint(256, (2, 140), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(tmp_path_factory.mktemp("trained"), trainer__max_steps=2)


@pytest.mark.parametrize("of", [".", "checkpoints/last.ckpt"])
def test_the_exported_model_gives_the_trained_ones_logits(
    of: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([f"--checkpoint={run / of}", f"--output={tmp_path / 'model'}"])
    checkpoint = run / "checkpoints" / "last.ckpt"
    stored = read_checkpoint(run)["state_dict"]
    weights = sum(weight.numel() for name, weight in stored.items() if "scale" not in name and "head" not in name)
    said = f"{tmp_path / 'model'}: a torch.float32 model of {weights:,} weights from {checkpoint}\n"
    assert capsys.readouterr().out == said
    trained = LanguageModel.load_from_checkpoint(checkpoint, weights_only=True).eval()
    exported = Transformer.from_pretrained(tmp_path / "model")
    assert torch.equal(exported(TOKENS), trained(TOKENS))
    assert [p.scale_base for p in exported.modules() if isinstance(p, XPOS)] == [8.0]


def test_the_block_size_can_be_set(run: Path, tmp_path: Path) -> None:
    main([f"--checkpoint={run}", f"--output={tmp_path}", "--block_size=8"])
    assert Transformer.from_pretrained(tmp_path).block_size == 8
    main([f"--checkpoint={run}", f"--output={tmp_path}", "--block_size=0", "--overwrite=true"])
    assert Transformer.from_pretrained(tmp_path).block_size is None


def test_the_hybrid_of_the_documentation_is_trained_measured_and_exported(tmp_path: Path) -> None:
    documentation = (CONFIGS.parent / "docs" / "training.md").read_text()
    (example,) = re.findall(r"```yaml\n(model:\n.*?)```", documentation, re.DOTALL)
    (tmp_path / "hybrid.yaml").write_text(example)
    config: Any = {"model__num_layers": None, "trainer__max_steps": 2, "name": "hybrid"}
    run = fit(tmp_path, more=("--config", str(tmp_path / "hybrid.yaml")), **config)
    (found,) = find_runs([str(run)])
    assert found.encoding == "xPos and RoPE"
    main([f"--checkpoint={run}", f"--output={tmp_path / 'model'}"])
    trained, exported = found.model(torch.device("cpu")), Transformer.from_pretrained(tmp_path / "model")
    assert exported.block_size == trained.block_size == [32, 32, 32, None]
    for model in (trained, exported):
        *local, last = (attention.positions for attention in model.attentions)
        assert [type(positions) for positions in local] == [XPOS] * 3
        assert isinstance(last, RotaryEmbedding)
        assert last.max_wavelength == 128
    assert torch.equal(exported(TOKENS), trained(TOKENS))
    extrapolate([str(run)], str(tmp_path / "out"), longest=1, windows=2, modes=["dense", "BCA"])
    assert "| xPos and RoPE, dense " in (tmp_path / "out" / "report.md").read_text()


def test_a_model_trained_in_bfloat16_is_exported_so(tmp_path: Path) -> None:
    run = fit(tmp_path, trainer__max_steps=1, trainer__precision="bf16-true")
    main([f"--checkpoint={run}", f"--output={tmp_path / 'model'}"])
    exported = Transformer.from_pretrained(tmp_path / "model").state_dict()
    for name, weight in read_checkpoint(run)["state_dict"].items():
        assert torch.equal(exported[name.removeprefix("transformer.")], weight), name


def test_a_model_of_learned_tokens_takes_its_tokenizer_along(run: Path, tmp_path: Path, capfd: Any) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    of_tokens = fit(tmp_path, trainer__max_steps=1, data__tokenizer="bpe", data__tokenizer_size=270)
    folder = tmp_path / "model"
    main([f"--checkpoint={of_tokens}", f"--output={folder}"])
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocabulary = Transformer.from_pretrained(folder).config["vocab_size"]
    assert max(tokenizer.get_vocab(with_added_tokens=True).values()) < vocabulary <= 270
    learned = read_checkpoint(of_tokens)["TextData"]["tokenizer"]
    assert tokenizer.encode("to be or not").ids == tokenizers.Tokenizer.from_str(learned).encode("to be or not").ids
    # Nothing is overwritten unasked, not even it alone; and a model of bytes has none.
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()
    assert "tokenizer.json exists" in complaint([f"--checkpoint={run}", f"--output={folder}"], capfd)
    assert [path.name for path in folder.iterdir()] == ["tokenizer.json"]
    main([f"--checkpoint={run}", f"--output={folder}", "--overwrite=true"])
    assert not (folder / "tokenizer.json").exists()


WRONG: dict[str, tuple[list[str], str]] = {
    "nothing": ([], "the following arguments are required: checkpoint, output"),
    "no output": (["--checkpoint={run}"], "the following arguments are required: output"),
    "no checkpoint": (
        ["--checkpoint=nowhere", "--output={out}"],
        "there is no checkpoint nowhere; `python -m train fit`",
    ),
    "no run": (["--checkpoint=configs", "--output={out}"], "there is no checkpoint configs/checkpoints/last.ckpt; "),
    "no model": (["--checkpoint=README.md", "--output={out}"], "README.md is no checkpoint, or a damaged one"),
    "a negative block": (["--checkpoint={run}", "--output={out}", "--block_size=-1"], "block_size must be above 0"),
    "a file": (["--checkpoint={run}", "--output=README.md"], "README.md is no folder; give another path"),
    "an option that there is not": (["--chekpoint={run}"], "--chekpoint={run}; did you mean checkpoint?"),
}


@pytest.mark.parametrize(("args", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_option_is_told_in_one_line_and_leaves_nothing(
    args: list[str], message: str, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    places = {"run": run, "out": tmp_path / "model"}
    assert message.format(**places) in complaint([arg.format(**places) for arg in args], capfd)
    assert not (tmp_path / "model").exists()


def test_a_model_that_is_there_is_left_alone(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    args = [f"--checkpoint={run}", f"--output={tmp_path}"]
    main(args)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    line = complaint([*args, "--block_size=8"], capfd)
    assert line == f"{tmp_path / 'config.json'} exists; give another path, or --overwrite true"
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("positions", ["study.encodings.NoPositions", f"test_pretrained.{OwnPositions.__name__}"])
def test_a_position_module_of_ones_own_is_not_exported(
    positions: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changes: dict[str, Any] = {"model__positions": positions, "trainer__max_steps": 1}
    run = fit(tmp_path, **changes)
    line = complaint([f"--checkpoint={run}", f"--output={tmp_path / 'model'}"], capfd)
    assert line == f"positions must be XPOS or RotaryEmbedding to be saved, got {positions.rpartition('.')[2]}"
