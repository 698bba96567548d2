"""What may be set on a made module takes effect at once, and what may not is refused; numbers of any type are plain."""

import copy
import json
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from builders import LearnedBias, block, far_apart, model, normal, tokens

from xpos_zoo import XPOS, ALiBi, LogNScaling, RotaryEmbedding, ScaleInvariant, SoftTail, Transformer


@pytest.mark.parametrize(("name", "value"), [("base", 100), ("max_wavelength", 50), ("scale_base", 3)])
def test_an_argument_of_positions_that_is_set_later_gives_what_a_new_module_gives(name, value):
    late, x = XPOS(16, 8), normal(0, 20, 16)
    setattr(late, name, value)
    arguments: dict[str, Any] = {"scale_base": 8} | {name: value}
    assert torch.equal(late(x), XPOS(16, **arguments)(x))
    assert getattr(late, name) == value


@pytest.mark.parametrize(
    "module",
    [XPOS(16), RotaryEmbedding(16), block(), block().make_cache(1), model()],
    ids=lambda module: type(module).__name__,
)
def test_what_cannot_take_effect_later_cannot_be_set(module):
    fixed = "head_dim", "embed_dim", "num_heads", "qk_norm", "output_gate", "max_length", "attentions", "config"
    for name in fixed:
        if hasattr(type(module), name):
            with pytest.raises(AttributeError, match="no setter"):
                setattr(module, name, 4)


def test_a_module_takes_any_settings_place_and_gives_it_back():
    attention = block()
    for setting in ("query_scaling", "distance_bias"):
        for value in (LearnedBias(), None, LearnedBias(), SoftTail(2, 9)):
            setattr(attention, setting, value) if isinstance(value, LearnedBias) else attention.set_attention(
                **{setting: value}
            )
            assert getattr(attention, setting) is value
    with pytest.raises(ValueError, match="dropout must be"):
        attention.dropout = LearnedBias()


def test_a_model_hands_what_is_set_to_its_layers(tmp_path):
    changed, x = far_apart(model(2)), tokens(2, 30)
    changed.positions, changed.dropout = XPOS(8, 3), 0.25
    changed.distance_bias = ScaleInvariant(2.0)
    expected = far_apart(model(2, positions=partial(XPOS, scale_base=3), distance_bias=ScaleInvariant(2.0)))
    assert torch.equal(changed(x), expected(x))
    assert [layer.attention.dropout for layer in changed.layers] == [0.25, 0.25]  # type: ignore[union-attr]
    assert set(dict(changed.named_children())) == {"embedding", "layers", "norm", "head"}
    changed.save_pretrained(tmp_path)
    assert torch.equal(Transformer.from_pretrained(tmp_path)(x), expected(x))
    with pytest.raises(ValueError, match="block_size must be above 0"):
        changed.block_size = [4, 0]
    assert changed.block_size is None


@pytest.mark.parametrize("number", [np.float32, np.int64, torch.tensor], ids=["float32", "int64", "tensor"])
def test_numbers_of_any_type_are_saved_as_plain_ones(number):
    integer: Any = torch.tensor if number is torch.tensor else np.int64
    positions = partial(XPOS, scale_base=number(8), base=number(100), max_wavelength=number(50))
    saved = model(
        integer(1),
        integer(50),
        positions=positions,
        block_size=integer(4),
        query_scaling=LogNScaling(number(1), number(9)),
        distance_bias=SoftTail(number(2), number(9)),
        dropout=number(0),
    )
    plain = model(
        1,
        50,
        positions=partial(XPOS, scale_base=8, base=100, max_wavelength=50),
        block_size=4,
        query_scaling=LogNScaling(1, 9),
        distance_bias=SoftTail(2, 9),
    )
    assert json.loads(json.dumps(vars(saved.config))) == json.loads(json.dumps(vars(plain.config)))
    assert ScaleInvariant(number(10), number(1), number(9)) == ScaleInvariant(10, 1, 9)
    assert ALiBi(integer(4)) == ALiBi(4)


def test_a_cache_is_refused_once_its_keys_were_rotated_by_other_rates():
    module = block(positions=partial(XPOS, scale_base=16)).requires_grad_(False)
    cache, x = module.make_cache(2, 20), normal(0, 2, 5, 32)
    module(x, cache=cache)
    for name, value in {"base": 100.0, "scale_base": 17, "max_wavelength": 30, "rates": [1j] * 4}.items():
        changed = copy.deepcopy(module)
        setattr(changed.positions, name, value)
        with pytest.raises(ValueError, match="cache does not match this layer: positions had other rates"):
            changed(x, cache=cache)
    changed = copy.deepcopy(module)
    changed.positions = XPOS(8, 16, interleaved=False)
    with pytest.raises(ValueError, match="needs interleaved=False, was made with interleaved=True"):
        changed(x, cache=cache)
