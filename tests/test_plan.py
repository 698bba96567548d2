"""One plan a forward: what is made once for all layers, and that a failed forward leaves no trace."""

import copy
from functools import partial

import pytest
import torch
from builders import PATTERNS, Operations, block, model, tokens
from reference import relative_error
from torch import Tensor
from torch.distributed.utils import _apply_to_tensors

from xpos_zoo import XPOS, KeyValueCache, LogNScaling, RotaryEmbedding, SoftTail, plan_attention
from xpos_zoo.dense import DensePlan


def decode_operations(num_layers: int, block_size: int | None) -> Operations:
    transformer, words = model(num_layers, block_size=block_size).requires_grad_(False), tokens(2, 21)
    cache = transformer.make_cache(2, 40)
    transformer(words[:, :20], cache)
    with Operations() as seen:
        transformer(words[:, 20:], cache)
    return seen


@PATTERNS
def test_a_decoded_token_takes_fifty_operations_a_layer_and_one_look_at_the_device(block_size):
    one, four = (decode_operations(num_layers, block_size) for num_layers in (1, 4))
    assert len(four.names) - len(one.names) <= 3 * 50
    # Sines, integer phases, masks and slots depend on positions alone, and no layer more makes them again.
    for name in ("exp2", "bitwise", "remainder", "floor_divide", "where", "arange", "le.", "ge."):
        assert sum(name in each for each in one.names) == sum(name in each for each in four.names)
    assert sum("_local_scalar_dense" in name for name in four.names) <= 3  # three numbers of one tensor


@PATTERNS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_float64_and_no_operator_of_our_own_anywhere(dtype, block_size):
    transformer, words = model(block_size=block_size).to(dtype), tokens(2, 40)
    transformer.query_scaling, transformer.distance_bias = LogNScaling(0.2, 10), SoftTail(2.0, 10)
    cache = transformer.make_cache(2, 60)
    with Operations() as seen:
        transformer(words).sum().backward()
        for piece in words.split([20, 1, 19], dim=1):
            transformer(piece, cache)
    assert torch.float64 not in seen.dtypes
    assert {name.partition(".")[0] for name in seen.names} <= {"aten", "prim"}


def test_layers_share_a_plan_where_they_attend_alike_and_nowhere_else():
    xpos, x = partial(XPOS, scale_base=8), torch.zeros(2, 30, 32)
    positions = [xpos, xpos, xpos, RotaryEmbedding, partial(XPOS, scale_base=9)]
    transformer = model(5, positions=positions, block_size=[4, 4, None, 4, 4])
    cases = [plan.case for plan in plan_attention(transformer.attentions, x)]
    assert cases[0] is cases[1]
    assert len({id(case) for case in cases}) == 4
    transformer.attentions[0].positions = RotaryEmbedding(8)  # whatever made it
    cases = [plan.case for plan in plan_attention(transformer.attentions, x)]
    assert cases[0] is cases[3]


@PATTERNS
def test_blocks_of_ones_own_model_share_a_plan_and_a_cache(block_size):
    """As the README has it: the same outputs as each block by itself."""
    torch.manual_seed(0)
    blocks = [block(block_size=block_size).requires_grad_(False) for _ in range(3)]
    for each in blocks:
        torch.nn.init.normal_(each.q_proj.weight, std=0.3)
    x = torch.randn(2, 30, 32)

    def run(x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        for each, plan in zip(blocks, plan_attention(blocks, x, cache), strict=True):
            x = x + each.attend(x, plan)
        if cache is not None:
            cache.advance()
        return x

    expected = x
    for each in blocks:
        expected = expected + each(expected)
    assert torch.equal(run(x), expected)
    cache = KeyValueCache(blocks, batch_size=2)
    pieces = [run(piece, cache) for piece in x.split([20, 1, 9], dim=1)]
    assert relative_error(torch.cat(pieces, 1), expected) <= 1e-5


def test_a_plan_for_other_settings_is_refused():
    first, second, x = block(block_size=4), block(), torch.zeros(2, 30, 32)
    (plan,) = plan_attention([first], x)
    assert torch.equal(first.attend(x, plan), first(x))
    with pytest.raises(
        ValueError, match=r"plan does not match this block: needs .*None, None.* was made for .*4, None"
    ):
        second.attend(x, plan)


def test_mixed_precision_that_casts_arguments_leaves_a_plan_alone():
    """FSDP2's, with torch's own function for it."""
    (plan,) = plan_attention([block()], torch.zeros(2, 30, 32))
    assert isinstance(plan.case, DensePlan)
    before = plan.case.q_rotary.cos
    (cast,) = _apply_to_tensors(lambda t: t.half() if t.is_floating_point() else t, (plan,))
    assert cast.case.q_rotary.cos is before
    assert before is not None
    assert before.dtype == torch.float32


@PATTERNS
@pytest.mark.parametrize("sizes", [[5, 1], [5, 20], [13, 1, 7]])
@pytest.mark.parametrize("part", ["layers.2", "head"])
def test_a_forward_that_raises_leaves_the_cache_as_it_was(part, sizes, block_size):
    """Late, when layers have seen the tokens: other tokens then go on as if nothing had been."""
    transformer = model(3, block_size=block_size).requires_grad_(False)
    words, others = tokens(2, sum(sizes) + 12), 49 - tokens(2, sizes[-1])
    seen = sum(sizes[:-1])
    cache = transformer.make_cache(2, 60)
    for piece in words[:, :seen].split(sizes[:-1], dim=1):
        transformer(piece, cache)
    untouched = copy.deepcopy(cache)

    def fail(*_):
        raise KeyboardInterrupt

    hook = transformer.get_submodule(part).register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        transformer(others, cache)
    hook.remove()
    assert torch.equal(cache.length, untouched.length)
    for piece in words[:, seen:].split([0, 1, 5, 1, words.shape[1] - seen - 7], dim=1):
        assert torch.equal(transformer(piece, cache), transformer(piece, untouched))
