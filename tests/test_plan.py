"""One plan a forward: who sees whom, what is made once for all layers, and that a failed forward leaves no trace.

Axes: b batch, n sequence.
"""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import document_ids, normal, visible, within_documents
from torch import Tensor
from torch.distributed.utils import _apply_to_tensors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xpos_zoo import XPOS, LogNScaling, MultiHeadAttention, PositionModule, RotaryEmbedding, SoftTail, Transformer
from xpos_zoo.attention import plan_layers
from xpos_zoo.plan import first_seen, sees

PATTERNS = pytest.mark.parametrize("block_size", [None, 8], ids=["dense", "blockwise"])


def model(num_layers: int = 2, **options: Any) -> Transformer:
    torch.manual_seed(0)
    options.setdefault("positions", partial(XPOS, scale_base=8))
    return Transformer(50, 32, num_layers, 4, **options)


def tokens(*shape: int) -> Tensor:
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(0))


# Who sees whom


@given(n=st.integers(0, 40), block_size=st.none() | st.integers(1, 20))
def test_queries_see_what_the_formula_shows_and_so_many_keys(n, block_size):
    at = torch.arange(n)
    assert torch.equal(sees(at, at, block_size), visible(n, block_size))
    assert torch.equal(at + 1 - first_seen(at, block_size), visible(n, block_size).sum(-1))


def test_documents_and_places_without_a_key_are_hidden():
    at, ids = torch.arange(30), document_ids(30)
    assert torch.equal(sees(at, at, 7, ids, ids)[:, None], within_documents(visible(30, 7), ids))
    assert not sees(at, -1 - at, None).any()


# What is made once


class Operations(TorchDispatchMode):
    """What a forward calls: names of operators that are not views, and dtypes of what they give."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not any(name in str(func) for name in ("_unsafe_view", "promote_types")):
            self.names.append(str(func))
        self.dtypes |= {leaf.dtype for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        return result


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
    transformer = model(
        5,
        positions=[*[partial(XPOS, scale_base=8)] * 3, RotaryEmbedding, partial(XPOS, scale_base=9)],
        block_size=[4, 4, None, 4, 4],
    )
    plans = plan_layers(transformer.attentions, torch.zeros(2, 30, 32), None, None, None)
    assert plans[0] is plans[1]
    assert len({id(plan) for plan in plans}) == 4
    transformer.attentions[0].positions = RotaryEmbedding(8)  # whatever made it
    plans = plan_layers(transformer.attentions, torch.zeros(2, 30, 32), None, None, None)
    assert plans[0] is plans[3]


def test_a_plan_for_another_pattern_is_refused():
    first, second = MultiHeadAttention(32, 4, block_size=4), MultiHeadAttention(32, 4)
    x = torch.zeros(2, 30, 32)
    (plan,) = plan_layers([first], x, None, None, None)
    assert torch.equal(first(x, plan=plan), first(x))
    with pytest.raises(ValueError, match=r"plan must be made for .*None, None, None.* got one for .*4, None, None"):
        second(x, plan=plan)


# A forward that fails


@PATTERNS
@pytest.mark.parametrize("sizes", [[5, 1], [5, 20], [13, 1, 7]])
def test_a_forward_that_raises_leaves_the_cache_as_it_was(sizes, block_size):
    """In its last layer, when the others have seen the tokens: other tokens then go on as if nothing had been."""
    transformer = model(3, block_size=block_size).requires_grad_(False)
    words, others = tokens(2, sum(sizes) + 12), 49 - tokens(2, sizes[-1])
    seen = sum(sizes[:-1])
    cache = transformer.make_cache(2, 60)
    for piece in words[:, :seen].split(sizes[:-1], dim=1):
        transformer(piece, cache)
    untouched = copy.deepcopy(cache)

    def fail(*_):
        raise KeyboardInterrupt

    hook = transformer.layers[-1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        transformer(others, cache)
    hook.remove()
    assert torch.equal(cache.length, untouched.length)
    for piece in words[:, seen:].split([1, 5, 1, words.shape[1] - seen - 7], dim=1):
        assert torch.equal(transformer(piece, cache), transformer(piece, untouched))


def test_logits_that_do_not_fit_into_memory_leave_the_cache_as_it_was():
    transformer, words = model(block_size=8).requires_grad_(False), tokens(2, 30)
    cache, fresh = transformer.make_cache(2), transformer.make_cache(2)

    def fail(*_):
        raise MemoryError

    hook = transformer.head.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        transformer(words, cache)
    hook.remove()
    assert cache.length.tolist() == [0, 0]
    for piece in (words[:, :0], words):  # an empty one does not bring back what was kept
        assert torch.equal(transformer(piece, cache), transformer(piece, fresh))


def test_what_was_no_number_is_gone_after_a_reset():
    block, x = MultiHeadAttention(32, 4).requires_grad_(False), normal(0, 2, 20, 32)
    cache = block.make_cache(2, 20)
    block(x * torch.nan, cache)
    cache.reset()
    assert block(x[:, :5], cache).isfinite().all()


def test_a_step_in_which_no_row_counts_changes_nothing():
    block, x = MultiHeadAttention(32, 4).requires_grad_(False), normal(0, 2, 1, 32)
    cache = block.make_cache(2, 9)
    assert block(x, cache, torch.tensor([0, 0])).isfinite().all()
    assert torch.equal(block(x, cache), block(x, block.make_cache(2, 9)))


def test_mixed_precision_that_casts_arguments_leaves_a_plan_alone():
    """FSDP2's, with torch's own function for it."""
    (plan,) = plan_layers([MultiHeadAttention(32, 4)], torch.zeros(2, 30, 32), None, None, None)
    assert plan.q_table is not None
    table = plan.q_table.clone()
    (cast,) = _apply_to_tensors(lambda t: t.half() if t.is_floating_point() else t, (plan,))
    assert cast.q_table.dtype == torch.float32
    assert torch.equal(cast.q_table, table)


# Layers that differ


def hybrid() -> Transformer:
    """Local layers of xPos, and a global one of partial xPos that sharpens."""
    local, globally = partial(XPOS, scale_base=4), partial(XPOS, scale_base=8, max_wavelength=40)
    scaling = LogNScaling(0.3, 10)
    return model(
        3,
        positions=[local, local, globally],
        block_size=[4, 8, None],
        query_scaling=[None, None, scaling],
        num_kv_heads=2,
    ).requires_grad_(False)


def test_a_hybrid_gives_the_same_from_a_cache_as_at_once():
    transformer, words = hybrid(), tokens(2, 50)
    cache = transformer.make_cache(2, 50)
    pieces = [transformer(piece, cache) for piece in words.split([17, 1, 1, 30, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), transformer(words), rtol=1e-5, atol=1e-5)
    assert transformer.block_size == [4, 8, None]
    assert transformer.query_scaling == [None, None, LogNScaling(0.3, 10)]


def test_each_layer_of_a_hybrid_attends_in_its_own_way():
    transformer = hybrid()
    for attention, block_size in zip(transformer.attentions, [4, 8, None], strict=True):
        x = normal(0, 2, 40, 32)
        changed = x.clone()
        changed[:, 3] += 1
        reached = (attention(changed) != attention(x)).any(-1).all(0)
        assert torch.equal(reached, visible(40, block_size)[:, 3])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: model(2, block_size=[4]), "block_size must be one for all layers or a list of 2, got a list of 1"),
        (
            lambda: model(2, positions=[XPOS] * 3),
            "positions must be one for all layers or a list of 2, got a list of 3",
        ),
        (
            lambda: setattr(model(2), "query_scaling", []),
            "query_scaling must be one for all layers or a list of 2, got a list of 0",
        ),
        (
            lambda: model(2, positions=XPOS)(
                tokens(2, 5), model(2, positions=partial(XPOS, scale_base=2)).make_cache(2, 9)
            ),
            "cache must have the parts of 9 keys of these positions, got 1",
        ),
        (
            lambda: MultiHeadAttention(32, 4)(torch.zeros(2, 5, 32), MultiHeadAttention(32, 4).make_cache(2, 9)[0]),
            "cache must be one of make_cache, got LayerCache",
        ),
        (lambda: XPOS(8, max_wavelength=6), "max_wavelength must leave a pair: at least 6.283, got 6"),
        (lambda: XPOS(8, max_wavelength=-1), "max_wavelength must be above 0, or None for all pairs, got -1"),
        (lambda: setattr(XPOS(8), "rates", [1j]), "rates must be 4, one for each pair, got 1"),
        (
            lambda: setattr(MultiHeadAttention(32, 4), "positions", RotaryEmbedding(6)),
            "positions must give a PositionModule with a rate for each pair, got RotaryEmbedding(head_dim=6",
        ),
        (lambda: PositionModule([0.1 + 1j]), "rates must be finite, and their real parts at most 0, got (0.1+1j)"),
        (lambda: PositionModule([complex("nan")]), "rates must be finite, and their real parts at most 0, got (nan"),
        (
            lambda: MultiHeadAttention(32, 4, positions=lambda head_dim: PositionModule([1j])),
            "positions must give a PositionModule with a rate for each pair, got PositionModule()",
        ),
        (
            lambda: model(2)(tokens(2, 5), model(2, block_size=4).make_cache(2)),
            "cache must be made for block_size=None, got one for 4",
        ),
    ],
)
def test_errors_name_the_argument_its_value_and_what_is_allowed(call, said):
    with pytest.raises(ValueError, match="must") as raised:
        call()
    assert said in str(raised.value)
