"""A model that is saved and loaded again is the same model, bit for bit; what is no such folder says so."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from xpos_zoo import XPOS, LogNScaling, RotaryEmbedding, SoftTail, Transformer, TransformerConfig

safetensors_torch = pytest.importorskip("safetensors.torch")

SIZES: dict[str, Any] = {"vocab_size": 11, "embed_dim": 16, "num_layers": 2, "num_heads": 2}
TOKENS = torch.randint(11, (2, 20), generator=torch.Generator().manual_seed(0))


def make(**options: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(**(SIZES | options)).eval()


MODELS: dict[str, dict[str, Any]] = {
    "default": {},
    "decay": {"positions": partial(XPOS, scale_base=7)},
    "halves": {"positions": partial(XPOS, scale_base=6.1, base=100.0, interleaved=False)},
    "rotary": {"positions": partial(RotaryEmbedding, base=77.7, interleaved=False)},
    "blocks": {"block_size": 4},
    "grouped": {"num_kv_heads": 1, "head_dim": 4, "hidden_dim": 24},
    "untied": {"tie_embeddings": False},
    "dropout": {"dropout": 0.25},
    "partial": {"positions": partial(XPOS, scale_base=7, max_wavelength=30)},
    "layers that differ": {
        "positions": [partial(XPOS, scale_base=7), RotaryEmbedding],
        "block_size": [4, None],
        "query_scaling": [None, LogNScaling(0.5, 7)],
    },
}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_a_model_that_is_saved_and_loaded_gives_the_same_logits_bit_for_bit(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model = make(**options)
    model.save_pretrained(tmp_path / "model")
    loaded = Transformer.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    assert not loaded.training
    assert torch.equal(loaded(TOKENS), model(TOKENS))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_weight_keeps_its_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make().to(dtype)
    model.save_pretrained(tmp_path)
    loaded = Transformer.from_pretrained(tmp_path)
    assert {name: t.dtype for name, t in loaded.state_dict().items()} == {
        name: t.dtype for name, t in model.state_dict().items()
    }
    assert torch.equal(loaded(TOKENS), model(TOKENS))


def test_a_model_of_a_configuration_is_a_fresh_one_of_its_arguments() -> None:
    torch.manual_seed(0)
    config = TransformerConfig(**SIZES, block_size=[4, None], positions={"name": "XPOS", "scale_base": 7})
    fresh = Transformer.from_config(config).eval()
    same = make(block_size=[4, None], positions=partial(XPOS, scale_base=7))
    assert torch.equal(fresh(TOKENS), same(TOKENS))
    assert fresh.config == same.config
    assert Transformer.from_config(fresh.config).config == fresh.config


def test_settings_for_contexts_beyond_the_trained_length_are_kept(tmp_path: Path) -> None:
    model = make()
    model.query_scaling, model.distance_bias = LogNScaling(0.2, 8), SoftTail(1.5, 8)
    model.save_pretrained(tmp_path)
    loaded = Transformer.from_pretrained(tmp_path)
    assert (loaded.query_scaling, loaded.distance_bias) == (model.query_scaling, model.distance_bias)
    assert torch.equal(loaded(TOKENS), model(TOKENS))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_stored_once_and_tied_again(tied: bool, tmp_path: Path) -> None:
    make(tie_embeddings=tied).save_pretrained(tmp_path)
    assert ("head.weight" in safetensors_torch.load_file(tmp_path / "model.safetensors")) != tied
    loaded = Transformer.from_pretrained(tmp_path)
    assert (loaded.head.weight is loaded.embedding.weight) == tied


def test_a_loaded_model_can_be_trained_on(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    model = Transformer.from_pretrained(tmp_path).train()
    model(TOKENS).sum().backward()
    assert all(p.grad is not None and p.is_leaf for p in model.parameters())


def test_the_configuration_is_plain_and_complete(tmp_path: Path) -> None:
    make(positions=partial(XPOS, scale_base=64), block_size=8).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "format": "xpos_zoo.Transformer",
        "version": 2,
        "vocab_size": 11,
        "embed_dim": 16,
        "num_layers": 2,
        "hidden_dim": 64,
        "tie_embeddings": True,
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 8,
        "block_size": 8,
        "dropout": 0.0,
        "positions": {"name": "XPOS", "scale_base": 64, "base": 10000.0, "max_wavelength": None, "interleaved": True},
        "query_scaling": None,
        "distance_bias": None,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_model_that_is_there_is_replaced_only_when_asked(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    other = make(num_heads=4)
    with pytest.raises(ValueError, match=r"config\.json exists; give another path, or overwrite=True"):
        other.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    other.save_pretrained(tmp_path, overwrite=True)
    assert Transformer.from_pretrained(tmp_path).config == other.config


class OwnPositions(RotaryEmbedding):
    pass


def test_what_the_library_cannot_make_again_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="positions must be XPOS or RotaryEmbedding to be saved, got OwnPositions"):
        make(positions=OwnPositions).save_pretrained(tmp_path / "model")
    model = make()
    model.distance_bias = lambda distance: -distance.float()
    with pytest.raises(ValueError, match="distance_bias must be SoftTail to be saved, got function"):
        model.save_pretrained(tmp_path / "model")
    model = make()
    model.attentions[1].positions.rates = RotaryEmbedding(8).rates
    with pytest.raises(ValueError, match="positions must have the rates of their arguments to be saved"):
        model.save_pretrained(tmp_path / "model")
    model = make()
    model.attentions[1].dropout = 0.5
    with pytest.raises(ValueError, match=r"dropout must be the same in all layers to be saved, got \[0\.0, 0\.5\]"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def edited(**changes: Any) -> Callable[[Path], None]:
    """Change the configuration; `...` takes a key away."""

    def edit(folder: Path) -> None:
        file = folder / "config.json"
        config = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))

    return edit


def cut(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return edit


def stored(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = safetensors_torch.load_file(folder / "model.safetensors")
        change(weights)
        safetensors_torch.save_file(weights, folder / "model.safetensors")

    return edit


WRONG_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "there is no "),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "there is no "),
    "half a configuration": (cut("config.json"), "config.json: "),
    "half the weights": (cut("model.safetensors"), "model.safetensors: "),
    "a pickle": (lambda folder: torch.save(make().state_dict(), folder / "model.safetensors"), "model.safetensors: "),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json: must be a mapping with format "),
    "another program's": (edited(format="gpt2"), "config.json: must be a mapping with format 'xpos_zoo.Transformer'"),
    "a later version": (edited(version=3), "config.json: must be a mapping with version 2"),
    "a key too few": (edited(head_dim=...), "config.json: lacks 'head_dim'"),
    "a key too many": (edited(head_dimm=3), "config.json: has an unknown 'head_dimm'"),
    "a size that is a word": (edited(embed_dim="wide"), "config.json: embed_dim must be above 0 and an integer"),
    "a size that does not divide": (edited(num_kv_heads=3), "config.json: num_kv_heads must divide num_heads=2, got 3"),
    "positions without a name": (edited(positions="XPOS"), "config.json: positions must be a mapping with the name "),
    "unknown positions": (
        edited(positions={"name": "os.system"}),
        "config.json: positions must be a mapping with the name XPOS or RotaryEmbedding, got {'name': 'os.system'}",
    ),
    "another's argument": (edited(positions={"name": "XPOS", "scale": 3}), "unexpected keyword argument 'scale'"),
    "a scale_base of 0": (
        edited(positions={"name": "XPOS", "scale_base": 0}),
        "config.json: scale_base must be above 0 and finite, got 0",
    ),
    "an unknown bias": (edited(distance_bias={"name": "eval"}), "must be a mapping with the name SoftTail, got "),
    "another width": (edited(hidden_dim=32), "size mismatch for layers.0.feed_forward.gate_proj.weight"),
    "a layer too few": (edited(num_layers=1), "model.safetensors: "),
    "a tensor too few": (stored(lambda weights: weights.pop("norm.weight")), 'Missing key(s) in state_dict: "norm.wei'),
    "another decay": (
        stored(lambda weights: weights["layers.0.attention.positions.scale"].mul_(2)),
        "scale must be (i / (head_dim/2) + 0.4) / 1.4 for head_dim=8",
    ),
}


@pytest.mark.parametrize(("damage", "message"), WRONG_FOLDERS.values(), ids=WRONG_FOLDERS.keys())
def test_a_folder_that_will_not_do_is_told_in_one_line(
    damage: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    make().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (its message is compared below)
        Transformer.from_pretrained(tmp_path)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_without_safetensors_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make().save_pretrained(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for action in (partial(Transformer.from_pretrained, tmp_path / "model"), partial(make().save_pretrained, tmp_path)):
        with pytest.raises(ValueError, match="needs safetensors: `pip install safetensors`"):
            action()


def test_a_save_that_is_cut_short_leaves_the_model_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make().save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def write_half(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(OSError, match="No space left"):
        make(num_heads=4).save_pretrained(tmp_path, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_another_process_generates_the_same_text(tmp_path: Path) -> None:
    model = make()
    nn.init.normal_(model.embedding.weight)  # a fresh model's logits are too close to each other
    model.save_pretrained(tmp_path)
    program = (
        "import sys, torch; from xpos_zoo import Transformer; model = Transformer.from_pretrained(sys.argv[1]); "
        "print(model.generate(torch.tensor([[1, 2, 3]]), 20, seed=1).tolist())"
    )
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == model.generate(torch.tensor([[1, 2, 3]]), 20, seed=1).tolist()
