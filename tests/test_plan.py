"""One plan a forward: what is made once for all layers, and that a failed forward leaves no trace."""

import copy
from functools import partial

import pytest
import torch
from reference import PATTERNS, Operations, block, model, tokens
from torch.distributed.utils import _apply_to_tensors

from xpos_zoo import XPOS, LogNScaling, RotaryEmbedding, SoftTail
from xpos_zoo.attention import plan_layers


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
    plans = plan_layers(transformer.attentions, x, None, None, None)
    assert plans[0] is plans[1]
    assert len({id(plan) for plan in plans}) == 4
    transformer.attentions[0].positions = RotaryEmbedding(8)  # whatever made it
    plans = plan_layers(transformer.attentions, x, None, None, None)
    assert plans[0] is plans[3]


def test_a_plan_for_another_pattern_is_refused():
    first, second, x = block(block_size=4), block(), torch.zeros(2, 30, 32)
    (plan,) = plan_layers([first], x, None, None, None)
    assert torch.equal(first(x, plan=plan), first(x))
    with pytest.raises(ValueError, match=r"plan must be made for .*None, None, None.* got one for .*4, None, None"):
        second(x, plan=plan)


def test_mixed_precision_that_casts_arguments_leaves_a_plan_alone():
    """FSDP2's, with torch's own function for it."""
    (plan,) = plan_layers([block()], torch.zeros(2, 30, 32), None, None, None)
    assert plan.q_table is not None
    table = plan.q_table.clone()
    (cast,) = _apply_to_tensors(lambda t: t.half() if t.is_floating_point() else t, (plan,))
    assert cast.q_table.dtype == torch.float32
    assert torch.equal(cast.q_table, table)


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
