"""MultiHeadAttention, its LogNScaling and its bias.

Axes: b batch, n sequence, d head dimension.
"""

import copy
import math
import pickle
from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import DTYPES, HALVES, Sloped, assert_block_is_exact, normal, relative_error, roundoff, visible
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from xpos_zoo import XPOS, DistanceBias, LogNScaling, MultiHeadAttention, PositionModule, RotaryEmbedding, SoftTail

DENSE_AND_BLOCKWISE = pytest.mark.parametrize("block_size", [None, 12], ids=["dense", "blockwise"])


def block(
    embed_dim: int = 32,
    num_heads: int = 4,
    query_scaling: LogNScaling | None = None,
    distance_bias: DistanceBias | None = None,
    **options,
) -> MultiHeadAttention:
    torch.manual_seed(0)
    module = MultiHeadAttention(embed_dim, num_heads, **options)
    module.query_scaling, module.distance_bias = query_scaling, distance_bias
    return module


class LearnedBias(nn.Module):
    """A bias to learn for each of four heads and each of the first eight distances; the eighth is all others'."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(normal(5, 4, 8))

    def forward(self, distance: Tensor) -> Tensor:
        heads = torch.arange(4, device=distance.device)[:, None, None]
        return self.table[heads, distance.long().clamp(0, 7)]


# Exactness


@DENSE_AND_BLOCKWISE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": 2},
        {"num_kv_heads": 1},
        {"head_dim": 6},
        {"bias": True},
        {"positions": partial(XPOS, scale_base=16, interleaved=False)},
        {"positions": partial(XPOS, scale_base=0.3)},
        {"positions": RotaryEmbedding},
        {"query_scaling": LogNScaling(0.5, 10)},
        {"query_scaling": LogNScaling(0.5, 10), "positions": RotaryEmbedding},
        {"distance_bias": SoftTail(3.0, 10)},
        {"distance_bias": SoftTail(3.0, 10), "num_kv_heads": 2, "positions": partial(XPOS, scale_base=0.3)},
        {"distance_bias": LearnedBias()},
        {"positions": Sloped, "num_kv_heads": 2},
        {"positions": Sloped, "distance_bias": SoftTail(3.0, 10), "query_scaling": LogNScaling(0.5, 10)},
    ],
    ids=[
        "as it is",
        "grouped",
        "multi-query",
        "head_dim",
        "bias",
        "half-split",
        "in chunks",
        "rotary",
        "query_scaling",
        "query_scaling, rotary",
        "soft tail",
        "soft tail, grouped, in chunks",
        "learned bias",
        "positions with a bias, grouped",
        "positions with a bias, soft tail, temperature",
    ],
)
def test_the_block_equals_the_formula(options, dtype, block_size):
    module = block(block_size=block_size, **options).to(dtype)
    assert_block_is_exact(module, normal(0, 2, 41, 32, dtype=dtype))


@given(
    n=st.integers(0, 40),
    b=st.integers(0, 2),
    embed_dim=st.integers(1, 24),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    head_dim=st.sampled_from([2, 6, 8]),
    bias=st.booleans(),
    positions=st.sampled_from([RotaryEmbedding, XPOS, partial(XPOS, scale_base=3, interleaved=False)]),
    block_size=st.none() | st.integers(1, 20),
    query_scaling=st.none() | st.builds(LogNScaling, st.sampled_from([0.1, 1.0]), st.integers(1, 20)),
    distance_bias=st.none() | st.builds(SoftTail, st.sampled_from([0.5, 4.0]), st.integers(1, 20)),
    dtype=st.sampled_from(DTYPES),
)
def test_the_block_equals_the_formula_whatever_its_options(
    n, b, embed_dim, heads, head_dim, bias, positions, block_size, query_scaling, distance_bias, dtype
):
    num_heads, num_kv_heads = heads
    module = block(
        embed_dim,
        num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        bias=bias,
        positions=positions,
        block_size=block_size,
        query_scaling=query_scaling,
        distance_bias=distance_bias,
    ).to(dtype)
    assert_block_is_exact(module, normal(0, b, n, embed_dim, dtype=dtype))


@DENSE_AND_BLOCKWISE
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("distance_bias", [None, SoftTail(8.0, 5)], ids=["no bias", "soft tail"])
def test_autocast_is_as_exact_as_its_dtype(distance_bias, dtype, block_size):
    module = block(block_size=block_size, distance_bias=distance_bias)
    assert_block_is_exact(module, normal(0, 2, 77, 32), autocast=dtype)


@DENSE_AND_BLOCKWISE
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("num_kv_heads", [4, 1], ids=["equal heads", "multi-query"])
@pytest.mark.parametrize("positions", [XPOS, Sloped], ids=["no bias", "bias a head"])
@pytest.mark.gpu
def test_the_block_equals_the_formula_on_cuda(positions, num_kv_heads, dtype, block_size):
    module = block(num_kv_heads=num_kv_heads, block_size=block_size, positions=positions).to(dtype)
    assert_block_is_exact(module, normal(0, 2, 41, 32, dtype=dtype), device="cuda")


@pytest.mark.slow
@DENSE_AND_BLOCKWISE
def test_the_compiled_block_is_as_exact_in_two_graphs(block_size, compiler_counts: dict[str, Counter[str]]):
    module = block(num_kv_heads=2, block_size=block_size)
    compiled = torch.compile(MultiHeadAttention.forward, fullgraph=True)

    def run(module: MultiHeadAttention, x: Tensor) -> Tensor:
        torch._dynamo.mark_dynamic(x, 1)
        return compiled(module, x)

    for n in (30, 36):  # blocks are full or not
        assert_block_is_exact(module, normal(0, 2, n, 32), run)
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (25, 37, 41, 48, 70):
            assert_block_is_exact(module, normal(0, 2, n, 32), run)
    assert compiler_counts["stats"]["unique_graphs"] <= 2
    assert not compiler_counts["graph_break"]


# Causality and options that may change


@DENSE_AND_BLOCKWISE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, 11, 12, 30, 39])
def test_outputs_before_a_change_are_the_same_to_the_last_bit(at, dtype, block_size):
    module, x = block(block_size=block_size).to(dtype), normal(0, 2, 40, 32, dtype=dtype)
    before = module(x)
    x[:, at:] = 30 * normal(1, 2, 40 - at, 32, dtype=dtype)
    after = module(x)
    assert torch.equal(after[:, :at], before[:, :at])
    assert (after != before)[:, at:].any(-1).all()


def test_block_size_may_be_set_on_a_trained_dense_block():
    module, x = block(), normal(0, 2, 40, 32)
    dense = module(x)
    module.block_size = 12
    assert torch.equal(module(x), block(block_size=12)(x))
    module.block_size = None
    assert torch.equal(module(x), dense)


def test_dropout_acts_in_training_alone():
    x = normal(0, 2, 40, 32)
    without, module = block()(x), block(dropout=0.5)
    assert torch.equal(module.eval()(x), without)
    assert relative_error(module.train()(x), without) > 0.1


@DENSE_AND_BLOCKWISE
def test_dropout_keeps_the_mean(block_size):
    module, x = block(dropout=0.5, block_size=block_size), normal(0, 1, 30, 32)
    for linear in (module.v_proj, module.out_proj):
        nn.init.eye_(linear.weight)
    torch.manual_seed(0)
    samples = module(x.expand(1000, -1, -1))
    # A weight is doubled or dropped: variance sum w^2 v^2 <= max v^2, over 1000 samples; 5 sigma.
    assert ((samples.mean(0) - module.eval()(x)).abs() <= 5 * x.abs().amax((0, 1)) / 1000**0.5).all()


# LogNScaling


@DENSE_AND_BLOCKWISE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trained_length", [1, 10, 20, 40])
def test_log_n_scaling_is_exactly_off_for_queries_within_the_trained_length(trained_length, dtype, block_size):
    module, x = block(block_size=block_size).to(dtype), normal(0, 2, 40, 32, dtype=dtype)
    off = module(x)
    module.query_scaling = LogNScaling(0.5, trained_length)
    on = module(x)
    beyond = visible(40, block_size).sum(-1) > trained_length
    assert torch.equal(on[:, ~beyond], off[:, ~beyond])
    assert (on != off)[:, beyond].any(-1).all()
    module.query_scaling = None
    assert torch.equal(module(x), off)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_compiled_log_n_scaling_takes_a_few_kernels_more_and_is_not_in_that_of_the_heads(compiler_counts):
    from torch._inductor import config, metrics

    kernels, x = [], normal(0, 2, 40, 32)
    for scaling in (None, LogNScaling(0.5, 10)):
        module = block(query_scaling=scaling).requires_grad_(False)
        torch._dynamo.reset()
        metrics.reset()
        with config.patch(force_disable_caches=True):
            output = torch.compile(module, fullgraph=True)(x)
        assert relative_error(output, module(x)) <= 100 * roundoff(torch.float32)  # sums in another order
        kernels.append(metrics.generated_kernel_count)
    # Factors, the table with them, which q and k no longer share, and so neither a kernel.
    assert kernels[1] <= kernels[0] + 4


# A bias by distance


@DENSE_AND_BLOCKWISE
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_soft_tail_is_off_within_the_trained_length(dtype, block_size):
    """Up to the rounding of another kernel; set to None, to the last bit."""
    module, x = block(block_size=block_size).to(dtype), normal(0, 2, 40, 32, dtype=dtype)
    off = module(x)
    module.distance_bias = SoftTail(4.0, 40)
    assert_block_is_exact(module, x)
    assert relative_error(module(x), off) <= 100 * roundoff(dtype)
    module.distance_bias = SoftTail(4.0, 5)
    assert relative_error(module(x)[:, 6:], off[:, 6:]) >= 0.01
    module.distance_bias = None
    assert torch.equal(module(x), off)


def test_a_bias_may_be_a_function_a_module_or_none_in_any_order():
    module = block()
    learned = LearnedBias()
    for bias in (SoftTail(1.0, 5), learned, SoftTail(2.0, 5), None, learned, None, lambda distance: -distance):
        module.distance_bias = bias
        assert module.distance_bias is bias
        assert ("distance_bias.table" in module.state_dict()) == (bias is learned)
        assert (learned.table in set(module.parameters())) == (bias is learned)
        assert f"distance_bias={bias}" in repr(module) or bias is learned


# State


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_gives_the_same_numbers(copied):
    module = block(
        block_size=12,
        positions=partial(XPOS, scale_base=16),
        query_scaling=LogNScaling(0.5, 5),
        distance_bias=SoftTail(3.0, 10),
    )
    x = normal(0, 2, 40, 32)
    assert torch.equal(copied(module)(x), module(x))


@DENSE_AND_BLOCKWISE
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_made_on_the_meta_device_gives_the_loaded_ones_numbers(dtype, block_size):
    module, x = block(block_size=block_size).to(dtype), normal(0, 2, 40, 32, dtype=dtype)
    with torch.device("meta"):
        other = MultiHeadAttention(32, 4, block_size=block_size).to(dtype)
    other.to_empty(device="cpu")
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("bias", [False, True])
def test_every_projection_has_a_bias_or_none(bias):
    kinds = ["weight", "bias"] if bias else ["weight"]
    expected = {f"{name}_proj.{kind}" for name in ("q", "k", "v", "out") for kind in kinds}
    assert {name for name, _ in block(bias=bias).named_parameters()} == expected


def test_the_state_dict_fits_any_block_size():
    state = block(block_size=12).state_dict()
    dense = MultiHeadAttention(32, 4)
    dense.load_state_dict(state)
    x = normal(0, 2, 40, 32)
    assert torch.equal(dense(x), block()(x))


@DENSE_AND_BLOCKWISE
@pytest.mark.parametrize("dtype", HALVES)
def test_casting_loses_nothing_but_the_weights_precision(dtype, block_size):
    """A block cast to a half and back has the numbers of one whose weights alone were rounded."""
    cast, x = block(block_size=block_size).to(dtype).float(), normal(0, 2, 77, 32)
    rounded = block(block_size=block_size)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.to(dtype).float()
    assert torch.equal(cast(x), rounded(x))


# A position module of the user's own


class Unpositioned(PositionModule):
    """As CONTRIBUTING.md has it."""

    def __init__(self, head_dim: int):
        super().__init__(rates=[0j] * (head_dim // 2))


def plain_attention_of(module: MultiHeadAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (
        linear(x).unflatten(-1, (4, 8)).transpose(1, 2) for linear in (module.q_proj, module.k_proj, module.v_proj)
    )
    attended = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return module.out_proj(attended.transpose(1, 2).flatten(2))


@DENSE_AND_BLOCKWISE
def test_without_rates_it_is_plain_causal_attention(block_size):
    module, x = block(positions=Unpositioned, block_size=block_size), normal(0, 2, 40, 32)
    # Sums of up to 40 terms, in another order.
    expected = plain_attention_of(module, x, visible(40, block_size))
    assert relative_error(module(x), expected) <= 40 * roundoff(torch.float32)


@DENSE_AND_BLOCKWISE
def test_rates_of_ones_own_are_those_of_the_module_that_has_them(block_size):
    rates, x = XPOS(8, 5).rates, normal(0, 2, 40, 32)
    own = block(positions=lambda head_dim: PositionModule(rates), block_size=block_size)
    assert torch.equal(own(x), block(positions=partial(XPOS, scale_base=5), block_size=block_size)(x))


# Errors

x = torch.zeros(2, 5, 32)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: block(0), "embed_dim must be above 0 and an integer, got 0"),
        (lambda: block(-8), "embed_dim must be above 0 and an integer, got -8"),
        (lambda: block(32.0), "embed_dim must be above 0 and an integer, got 32.0"),  # type: ignore[arg-type]
        (lambda: block(32, 0), "num_heads must be above 0 and an integer, got 0"),
        (lambda: block(32, True), "num_heads must be above 0 and an integer, got True"),
        (lambda: block(32, "4"), "num_heads must be above 0 and an integer, got '4'"),  # type: ignore[arg-type]
        (lambda: block(32, 5), "embed_dim must be divisible by num_heads=5, got 32; or give head_dim"),
        (lambda: block(num_kv_heads=0), "num_kv_heads must be above 0 and an integer, got 0"),
        (lambda: block(num_kv_heads=3), "num_kv_heads must divide num_heads=4, got 3"),
        (lambda: block(num_kv_heads=8), "num_kv_heads must divide num_heads=4, got 8"),
        (lambda: block(head_dim=0), "head_dim must be even and above 0, got 0"),
        (lambda: block(head_dim=7), "head_dim must be even and above 0, got 7"),
        (lambda: block(28, 4), "head_dim must be even and above 0, got 7"),
        (lambda: block(block_size=0), "block_size must be above 0 and an integer, or None for dense attention, got 0"),
        (
            lambda: block(block_size=-1),
            "block_size must be above 0 and an integer, or None for dense attention, got -1",
        ),
        (lambda: block(block_size=12.5), "or None for dense attention, got 12.5"),
        (lambda: block(block_size=True), "or None for dense attention, got True"),
        (lambda: setattr(block(), "block_size", 0), "block_size must be above 0 and an integer, or None"),
        (lambda: setattr(block(), "query_scaling", 0.2), "query_scaling must be a LogNScaling or None, got 0.2"),
        (
            lambda: setattr(block(), "distance_bias", 0.2),
            "distance_bias must be callable, such as a SoftTail, or None, got 0.2",
        ),
        (
            lambda: block(positions=XPOS(8)),
            "positions must be called with head_dim to give a module",
        ),
        (
            lambda: block(positions=lambda d: nn.Identity()),
            "positions must give a PositionModule with a rate for each pair, got Identity()",
        ),
        (lambda: block(dropout=1), "dropout must be in [0, 1), got 1"),
        (lambda: block(dropout=-0.1), "dropout must be in [0, 1), got -0.1"),
        (lambda: block(dropout=math.nan), "dropout must be in [0, 1), got nan"),
        (lambda: block()(x[0]), "x must have shape (batch, seq_len, embed_dim=32), got (5, 32)"),
        (lambda: block()(x[..., :31]), "x must have shape (batch, seq_len, embed_dim=32), got (2, 5, 31)"),
        (lambda: block()(x[:, None]), "x must have shape (batch, seq_len, embed_dim=32), got (2, 1, 5, 32)"),
        (lambda: block()(x.half()), "x must have the weights' dtype torch.float32, or run under autocast, got"),
        (lambda: block().half()(x), "x must have the weights' dtype torch.float16, or run under autocast, got"),
        (lambda: block()(x.long()), "x must have the weights' dtype torch.float32, or run under autocast, got"),
        (lambda: LogNScaling(-0.1, 10), "coefficient must be 0 or above and finite, got -0.1"),
        (lambda: LogNScaling(math.nan, 10), "coefficient must be 0 or above and finite, got nan"),
        (lambda: LogNScaling(math.inf, 10), "coefficient must be 0 or above and finite, got inf"),
        (lambda: LogNScaling(0.1, 0), "trained_length must be above 0, got 0"),
        (lambda: LogNScaling(0.1, -5), "trained_length must be above 0, got -5"),
    ],
)
def test_errors_name_the_argument_its_value_and_what_is_allowed(call, said):
    with pytest.raises(ValueError, match="must") as raised:
        call()
    assert said in str(raised.value)


def test_integers_are_refused_under_autocast_too():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="must have the weights' dtype"):
        block()(x.long())


@pytest.mark.parametrize("value", [0, 12.5])
def test_a_refused_block_size_leaves_the_old_one(value):
    module = block(block_size=12)
    with pytest.raises(ValueError, match="block_size"):
        module.block_size = value
    assert module.block_size == 12
