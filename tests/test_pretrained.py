"""A model that is saved and loaded again is the same model, bit for bit; what is no such folder says so."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from xpos_zoo import (
    XPOS,
    LogNScaling,
    RotaryEmbedding,
    ScalableSoftmax,
    ScaleInvariant,
    SoftTail,
    Transformer,
    TransformerConfig,
)

safetensors_torch = pytest.importorskip("safetensors.torch")

SIZES: dict[str, Any] = {"vocab_size": 11, "embed_dim": 16, "num_layers": 2, "num_heads": 2}
TOKENS = torch.randint(11, (2, 20), generator=torch.Generator().manual_seed(0))
MODELS: dict[str, dict[str, Any]] = {
    "default": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "half-split": {"positions": partial(XPOS, scale_base=6.1, base=100.0, interleaved=False)},
    "rotary": {"positions": partial(RotaryEmbedding, base=77.7, interleaved=False), "tie_embeddings": False},
    "QK-norm": {"qk_norm": True},
    "gates and a window": {"output_gate": True, "window_size": 4},
    "grouped": {"num_kv_heads": 1, "head_dim": 4, "hidden_dim": 24, "dropout": 0.25},
    "partial": {"positions": partial(XPOS, scale_base=7, max_wavelength=30), "block_size": 4},
    "layers that differ": {
        "positions": [partial(XPOS, scale_base=7), RotaryEmbedding],
        "block_size": [4, None],
        "query_scaling": [ScalableSoftmax(9), LogNScaling(0.5, 7)],
        "distance_bias": [SoftTail(2.0, 9), None],
    },
}


def make(**options: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(**(SIZES | options)).eval()


def dtypes(model: torch.nn.Module) -> dict[str, torch.dtype]:
    return {name: t.dtype for name, t in model.state_dict().items()}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_a_model_that_is_saved_and_loaded_gives_the_same_logits_bit_for_bit(options, tmp_path):
    model = make(**{"distance_bias": ScaleInvariant(5.0)} | options)
    model.save_pretrained(tmp_path / "model")
    loaded = Transformer.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    assert not loaded.training
    assert dtypes(loaded) == dtypes(model)
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in loaded.parameters())
    assert (loaded.head.weight is loaded.embedding.weight) == model.config.tie_embeddings
    stored = safetensors_torch.load_file(tmp_path / "model/model.safetensors")
    assert ("head.weight" in stored) != model.config.tie_embeddings


def test_a_model_of_a_configuration_is_a_fresh_one_of_its_arguments():
    torch.manual_seed(0)
    config = TransformerConfig(**SIZES, block_size=[4, None], positions={"name": "XPOS", "scale_base": 7})
    fresh = Transformer.from_config(config).eval()
    same = make(block_size=[4, None], positions=partial(XPOS, scale_base=7))
    assert torch.equal(fresh(TOKENS), same(TOKENS))
    assert fresh.config == same.config == Transformer.from_config(fresh.config).config


def test_the_configuration_is_plain_and_complete(tmp_path):
    make(positions=partial(XPOS, scale_base=64), block_size=8).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    positions = {"name": "XPOS", "scale_base": 64, "base": 10000.0, "max_wavelength": None, "interleaved": True}
    sizes = SIZES | {"hidden_dim": 64, "num_kv_heads": 2, "head_dim": 8, "block_size": 8, "dropout": 0.0}
    settings = {
        "positions": positions,
        "qk_norm": False,
        "output_gate": False,
        "window_size": None,
        "tie_embeddings": True,
        "query_scaling": None,
        "distance_bias": None,
    }
    assert config == {"model_type": "xpos_zoo", "version": 3} | sizes | settings
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_folder_of_version_0_2_is_of_a_model_without_what_came_later(tmp_path):
    make().save_pretrained(tmp_path)
    older = Transformer.from_pretrained(rewritten(tmp_path, qk_norm=..., output_gate=..., window_size=...))
    assert (older.config.qk_norm, older.config.output_gate, older.config.window_size) == (False, False, None)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.iterdir()}


def test_a_model_that_is_there_is_replaced_only_when_asked(tmp_path):
    make().save_pretrained(tmp_path)
    before, other = contents(tmp_path), make(num_heads=4)
    with pytest.raises(ValueError, match=r"config\.json exists; give another path, or overwrite=True"):
        other.save_pretrained(tmp_path)
    assert contents(tmp_path) == before
    other.save_pretrained(tmp_path, overwrite=True)
    assert Transformer.from_pretrained(tmp_path).config == other.config


def test_a_save_that_is_cut_short_leaves_the_model_before_it(tmp_path, monkeypatch):
    make().save_pretrained(tmp_path)
    before = contents(tmp_path)

    def write_half(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(OSError, match="No space left"):
        make(num_heads=4).save_pretrained(tmp_path, overwrite=True)
    assert contents(tmp_path) == before


class OwnPositions(RotaryEmbedding):
    pass


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("positions", OwnPositions(8), "positions must be XPOS or RotaryEmbedding to be saved, got OwnPositions"),
        (
            "distance_bias",
            lambda distance: -distance,
            "distance_bias must be SoftTail or ScaleInvariant or ALiBi to be saved",
        ),
        ("positions.rates", RotaryEmbedding(8).rates, "positions must have the rates of their arguments to be saved"),
        ("dropout", 0.5, "dropout must be the same in all layers to be saved, got [0.0, 0.5]"),
    ],
)
def test_what_the_library_cannot_make_again_is_not_saved(name, value, said, tmp_path):
    model = make()
    owner, _, attribute = name.rpartition(".")
    setattr(model.attentions[1].get_submodule(owner), attribute, value)
    with pytest.raises(ValueError, match="to be saved") as error:
        model.save_pretrained(tmp_path / "model")
    assert said in str(error.value)
    assert not (tmp_path / "model").exists()


def rewritten(folder: Path, **changes: Any) -> Path:
    """With another configuration; `...` takes a key away."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def cut(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:150])


def reweighted(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = safetensors_torch.load_file(folder / "model.safetensors")
    change(weights)
    safetensors_torch.save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "there is no "),
        (partial(cut, name="config.json"), "config.json: "),
        (partial(cut, name="model.safetensors"), "model.safetensors: "),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json: must be a mapping with model_type "),
        (partial(rewritten, model_type="gpt2"), "config.json: must be a mapping with model_type 'xpos_zoo'"),
        (partial(rewritten, version=2), "config.json: must be a mapping with version 3"),
        (partial(rewritten, head_dim=...), "config.json: lacks 'head_dim'"),
        (partial(rewritten, head_dimm=3), "config.json: has an unknown 'head_dimm'"),
        (partial(rewritten, num_kv_heads=3), "config.json: num_kv_heads must divide num_heads=2, got 3"),
        (partial(rewritten, positions={"name": "os.system"}), "config.json: positions must be a mapping with the name"),
        (partial(rewritten, positions={"name": "XPOS", "scale": 3}), "unexpected keyword argument 'scale'"),
        (partial(rewritten, distance_bias={"name": "eval"}), "distance_bias must be a mapping with the name SoftTail"),
        (partial(rewritten, qk_norm=1), "config.json: qk_norm must be True or False, got 1"),
        (partial(rewritten, qk_norm=True), 'Missing key(s) in state_dict: "layers.0.attention.q_norm.weight"'),
        (partial(rewritten, hidden_dim=32), "size mismatch for layers.0.feed_forward.gate_proj.weight"),
        (partial(reweighted, change=lambda w: w.pop("norm.weight")), 'Missing key(s) in state_dict: "norm.weight"'),
        (partial(reweighted, change=lambda w: w["layers.0.attention.positions.scale"].mul_(2)), "scale must be (i / "),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_in_one_line_that_names_it(damage, message, tmp_path):
    make().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (its message is compared below)
        Transformer.from_pretrained(tmp_path)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_without_safetensors_the_message_says_what_to_install(tmp_path, monkeypatch):
    make().save_pretrained(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for action in (partial(Transformer.from_pretrained, tmp_path / "model"), partial(make().save_pretrained, tmp_path)):
        with pytest.raises(ValueError, match="needs safetensors: `pip install safetensors`"):
            action()
