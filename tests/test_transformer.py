"""Transformer: the documented architecture, its settings and its initialisation."""

from functools import partial

import pytest
import torch
from builders import DTYPES, LearnedBias, double, model, normal, tokens
from reference import Encoding, assert_as_exact, attention, gradients, multi_head_attention, plain_attention
from torch import Tensor
from torch.nn.functional import sigmoid

from xpos_zoo import XPOS, LogNScaling, RotaryEmbedding, SoftTail, Transformer, plan_attention


def logits(transformer: Transformer, tokens: Tensor, attend=attention) -> Tensor:
    """The documented architecture, step by step, on the model's own weights."""

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        mean_square = x.pow(2).mean(-1, keepdim=True)
        return x / (mean_square + 2**-23).sqrt() * weight

    weights = dict(transformer.named_parameters(remove_duplicate=False))
    x = weights["embedding.weight"][tokens]
    for i, attention_block in enumerate(transformer.attentions):
        layer = f"layers.{i}."
        x = x + multi_head_attention(attention_block, normed(x, weights[layer + "attention_norm.weight"]), attend)
        h = normed(x, weights[layer + "feed_forward_norm.weight"])
        gate, up, down = (weights[f"{layer}feed_forward.{name}_proj.weight"] for name in ("gate", "up", "down"))
        gated = h @ gate.T
        x = x + (gated * sigmoid(gated) * (h @ up.T)) @ down.T
    return normed(x, weights["norm.weight"]) @ weights["head.weight"].T


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"num_kv_heads": 2, "head_dim": 6, "hidden_dim": 20, "block_size": 7},
        {"tie_embeddings": False, "positions": RotaryEmbedding},
        {"positions": partial(XPOS, scale_base=5), "block_size": [7, None, 3]},
    ],
    ids=["other sizes", "untied and rotary", "layers that differ"],
)
def test_logits_and_gradients_are_those_of_the_documented_architecture(options, dtype):
    transformer, words = model(3, **options).to(dtype), tokens(2, 20)
    with torch.no_grad():  # the norms' weights all are 1, and the logits small, unless somebody trained them
        for i, parameter in enumerate(transformer.parameters()):
            parameter += 0.1 * normal(i, *parameter.shape, dtype=dtype)
    upstream = normal(99, 2, 20, 50, dtype=dtype)

    def results(run, transformer: Transformer) -> list[Tensor]:
        output = run(transformer, words)
        return [output, *gradients(output, upstream, transformer.parameters())]

    exact = results(logits, double(transformer))
    plain = results(partial(logits, attend=plain_attention), transformer)
    assert_as_exact((results(Transformer.__call__, transformer), exact, plain), 2, Encoding(), dtype)


def test_block_size_query_scaling_and_bias_reach_every_layer():
    plain, words = model(3), tokens(2, 20)
    settings = {"block_size": 7, "query_scaling": LogNScaling(0.5, 5), "distance_bias": SoftTail(2.0, 5)}
    transformer = model(3, **settings)
    assert [{name: getattr(a, name) for name in settings} for a in transformer.attentions] == 3 * [settings]
    with_all = transformer(words)
    for name, value in settings.items():
        assert getattr(transformer, name) == value
        setattr(transformer, name, None)
        setattr(plain, name, value)
    assert torch.equal(plain(words), with_all)
    assert torch.equal(transformer(words), model(3)(words))


def test_a_learned_bias_is_its_layers_own_and_keeps_its_values():
    learned = LearnedBias()
    values = learned.table.detach().clone()
    for biases in ([learned, None], torch.nn.ModuleList([learned, LearnedBias()])):
        transformer = model(2, distance_bias=biases)
        assert transformer.distance_bias == list(biases)
        assert torch.equal(transformer.state_dict()["layers.0.attention.distance_bias.table"], values)
        (gradient,) = gradients(transformer(tokens(2, 20)), normal(1, 2, 20, 50), [learned.table])
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("silent", ["feed_forward.down_proj", "attention.out_proj"])
def test_dropout_drops_features_of_either_branch_in_training_alone(silent):
    layer, x = model(1, dropout=0.25).layers[0], normal(0, 4, 50, 32)
    torch.nn.init.zeros_(layer.get_parameter(f"{silent}.weight"))  # so that the other branch is all there is

    def unchanged() -> Tensor:
        return layer(x, *plan_attention([layer.attention], x)) == x

    layer.train()
    assert abs(unchanged().double().mean().item() - 0.25) <= 6 * (0.25 * 0.75 / x.numel()) ** 0.5
    layer.eval()
    assert not unchanged().any()


@pytest.mark.parametrize(("embed_dim", "hidden_dim"), [(32, 96), (36, 96), (40, 128), (96, 256), (128, 352)])
def test_the_default_hidden_dim_is_eight_thirds_rounded_up_to_a_multiple_of_32(embed_dim, hidden_dim):
    names = dict(model(embed_dim=embed_dim, num_heads=2).named_parameters())
    assert names["layers.0.feed_forward.up_proj.weight"].shape == (hidden_dim, embed_dim)


@pytest.mark.parametrize(("num_layers", "tie_embeddings"), [(1, True), (8, False)])
def test_weights_begin_normal_with_the_documented_deviation(num_layers, tie_embeddings):
    transformer = model(embed_dim=64, num_layers=num_layers, tie_embeddings=tie_embeddings)
    for name, parameter in transformer.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all()
            continue
        residual = name.endswith(("out_proj.weight", "down_proj.weight"))
        std = 0.02 / (2 * num_layers) ** 0.5 if residual else 0.02
        count = parameter.numel()
        # Of `count` normal numbers: their mean has deviation std / sqrt(count), their square's mean sqrt(2 / count)
        # relatively. 6 sigma.
        assert abs(parameter.mean().item()) <= 6 * std / count**0.5
        assert parameter.square().mean().item() == pytest.approx(std**2, rel=6 * (2 / count) ** 0.5)
    assert any(name.endswith("down_proj.weight") for name, _ in transformer.named_parameters())
