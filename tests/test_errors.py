"""What a user can do wrong with the library: a ValueError that names the argument, its value and what is allowed."""

import math
from functools import partial

import pytest
import torch
from builders import block, model, tokens

from xpos_zoo import (
    XPOS,
    LogNScaling,
    MultiHeadAttention,
    PositionModule,
    RotaryEmbedding,
    ScaleInvariant,
    SoftTail,
    apply_rotary_pos_emb,
    duplicate_interleave,
    fixed_pos_embedding,
    rotate_every_two,
)
from xpos_zoo.generation import sample

x, table, h = torch.zeros(2, 5, 8), torch.zeros(5, 4), torch.zeros(2, 5, 32)  # for rotation; for attention
words = tokens(2, 5)
dense, blockwise, language = block(), block(block_size=8), model(block_size=8)


def with_cache(attention: MultiHeadAttention, module: MultiHeadAttention = dense, batch_size: int = 2, **options):
    return attention(h, cache=module.make_cache(batch_size, 9, dtype=options.pop("dtype", None)), **options)


CASES = [
    # The documented functions
    (lambda: fixed_pos_embedding(x), "x must have shape (seq_len, dim), got (2, 5, 8)"),
    (lambda: rotate_every_two(x[..., :3]), "x must have an even last dimension, got shape (2, 5, 3)"),
    (lambda: duplicate_interleave(x.sum()), "m must have at least one dimension, got a scalar"),
    (lambda: apply_rotary_pos_emb(x[..., :7], table, table), "with an even dim above 0, got (2, 5, 7)"),
    (lambda: apply_rotary_pos_emb(x.long(), table, table), "x must have a floating-point dtype, got torch.int64"),
    (lambda: apply_rotary_pos_emb(x, table.expand(3, 5, 4), table), "sin must be 4 or 8 wide and broadcast against"),
    (lambda: apply_rotary_pos_emb(x, table, table.expand(1, 2, 5, 4)), "of x (2, 5, 8), got (1, 2, 5, 4)"),
    (lambda: apply_rotary_pos_emb(x, table, table, table[:, :3]), "scale must be 1 or 4 or 8 wide and"),
    # Position modules
    (lambda: RotaryEmbedding(7), "head_dim must be even and above 0, got 7"),
    (lambda: setattr(XPOS(8), "scale_base", math.nan), "scale_base must be above 0 and finite, got nan"),
    (lambda: XPOS(8, max_wavelength=6), "max_wavelength must leave a pair: at least 6.283, got 6"),
    (lambda: XPOS(8, max_wavelength=-1), "max_wavelength must be above 0 and finite, got -1"),
    (lambda: PositionModule([0.1 + 1j]), "rates must be finite, and their real parts at most 0, got (0.1+1j)"),
    (lambda: XPOS(6)(x), "x must have shape (..., seq_len, head_dim=6), got (2, 5, 8)"),
    (lambda: XPOS(8)(x.int()), "x must have a floating-point dtype, got torch.int32"),
    (lambda: XPOS(8)(x, -3), "offset must be 0 or above and an integer, got -3"),
    # What changes logits
    (lambda: SoftTail(math.nan, 10), "power must be 0 or above and finite, got nan"),
    (lambda: ScaleInvariant(0.0), "tau must be above 0 and finite, got 0.0"),
    (lambda: ScaleInvariant(discount=1), "trained_length must be above 0 and finite, got None"),
    (lambda: ScaleInvariant(10, -1, 9), "discount must be 0 or above and finite, got -1"),
    (lambda: LogNScaling(math.inf, 10), "coefficient must be 0 or above and finite, got inf"),
    # Attention
    (lambda: block(32, 5), "embed_dim must be divisible by num_heads=5, got 32; or give head_dim"),
    (lambda: block(num_kv_heads=3), "num_kv_heads must divide num_heads=4, got 3"),
    (lambda: block(block_size=0), "block_size must be above 0 and an integer, or None for dense attention, got 0"),
    (lambda: block(query_scaling=0.2), "query_scaling must be callable, such as LogNScaling"),  # type: ignore[arg-type]
    (lambda: block(distance_bias=0.2), "distance_bias must be callable, such as ScaleInvariant(), or None, got 0.2"),  # type: ignore[arg-type]
    (lambda: block(distance_bias=ScaleInvariant), "distance_bias must be callable, such as ScaleInvariant(), or None"),
    (lambda: block(positions=XPOS(8)), "positions must be called with head_dim to give a module"),
    (lambda: block(positions=lambda d: RotaryEmbedding(6)), "positions must give a PositionModule with a rate"),
    (lambda: block(qk_norm=1), "qk_norm must be True or False, got 1"),
    (lambda: block(output_gate=None), "output_gate must be True or False, got None"),
    (lambda: block(window_size=0), "window_size must be above 0 and an integer, or None for dense attention, got 0"),
    (lambda: block(block_size=8, window_size=4), "block_size or window_size must be None, got 8 and 4"),
    (lambda: setattr(block(block_size=8), "window_size", 4), "block_size or window_size must be None, got 8 and 4"),
    (lambda: model(block_size=[8, None], window_size=4), "block_size or window_size must be None, got 8 and 4"),
    (lambda: with_cache(block(window_size=4)), "needs window_size=4, segment_length=1, was made with window_size=None"),
    (lambda: block(dropout=math.nan), "dropout must be 0 or above and finite, got nan"),
    (lambda: dense(h[0]), "x must have shape (batch, seq_len, embed_dim=32), got (5, 32)"),
    (lambda: dense(h.long()), "x must have the weights' dtype torch.float32, or run under autocast, got"),
    # Caches
    (lambda: dense.make_cache(2, 0), "max_length must be above 0 and an integer, got 0"),
    (lambda: dense.make_cache(-1, 5), "batch_size must be 0 or above and an integer, got -1"),
    (lambda: dense.make_cache(2, 9, dtype=torch.int32), "dtype must be a floating-point one, got torch.int32"),
    (lambda: dense.make_cache(2, 9).select(torch.tensor(1)), "rows must be integers (new batch size,), got"),
    (lambda: dense.make_cache(2).crop(-1), "lengths must be 0 or above and integers, got -1"),
    (lambda: dense.make_cache(2).crop(torch.tensor([3])), "lengths must be integers of shape (2,), got torch"),
    (lambda: model(block_size=[4, None]).make_cache(2).crop(3), "block_size and window_size must be None to crop a"),
    (lambda: dense(h, cache=dense.make_cache(2, 9)[0]), "cache must be one of make_cache, got LayerCache"),
    (lambda: with_cache(dense, blockwise), "needs block_size=None, segment_length=2048, was made w"),
    (lambda: with_cache(dense, batch_size=3), "cache does not match this layer: needs batch_size=2, was made"),
    (lambda: with_cache(dense, block(positions=partial(XPOS, scale_base=2))), "positions had other rates when it wa"),
    (lambda: with_cache(dense, dtype=torch.float16), "cache must hold the block's dtype torch.float32, got torch.flo"),
    (lambda: with_cache(dense, lengths=[5, 5]), "lengths must be a tensor of integers, got [5, 5]"),
    (lambda: with_cache(dense, lengths=torch.tensor([5, 6])), "lengths must be between 0 and seq_len=5, got [5, 6]"),
    (lambda: with_cache(dense, document_ids=words), "document_ids must be None with a cache"),
    (lambda: dense(h, document_ids=words[:, :4]), "document_ids must be integers of shape (2, 5), got torch.int64"),
    (lambda: dense(h, key_padding_mask=words[:, :4] == 0), "key_padding_mask must be bool of shape (2, 5), True for"),
    (lambda: language(words, key_padding_mask=words), "True for padding, got torch.int64 (2, 5)"),
    (lambda: dense(h, key_padding_mask=[0]), "True for padding, got [0]"),  # type: ignore[arg-type]
    (lambda: with_cache(dense, lengths=words[:, 0], key_padding_mask=words == 0), "lengths must be None with key"),
    (lambda: dense(h, lengths=torch.tensor([5, 5])), "lengths must be None without a cache"),
    # The model
    (lambda: model(block_size=[4]), "block_size must be one for all layers or a list of 2, got a list of 1"),
    (lambda: model(positions=[XPOS] * 3), "positions must be one for all layers or a list of 2, got a list of 3"),
    (lambda: language(x[0]), "tokens must be int64 or int32 (batch, seq_len), got torch.float32 (5, 8)"),
    (lambda: language(words, model(1, block_size=8).make_cache(2)), "cache does not match the model: needs 2 layers"),
    # Generation: raised by the call, not by the first token
    (lambda: language.stream(words[:, :0], 5), "tokens must have at least one token a row, got (2, 0)"),
    (lambda: language.generate(words, -1), "max_new_tokens must be 0 or above and an integer, got -1"),
    (lambda: language.stream(words, 2.5), "max_new_tokens must be 0 or above and an integer, got 2.5"),  # type: ignore[arg-type]
    (lambda: language.stream(words, 2, top_k=2.5), "top_k must be 1 or above and an integer, got 2.5"),  # type: ignore[arg-type]
    (lambda: language.stream(words + 99, 2), "tokens must be from 0 to 49, got"),
    (lambda: language.stream(words - 9, 2), "tokens must be from 0 to 49, got"),
    (lambda: language.stream(words, 2, eos=[3, 50]), "eos must be from 0 to 49, got 50"),
    (lambda: language.stream(words, 2, eos="."), "eos must be from 0 to 49, got '.'"),  # type: ignore[arg-type]
    (lambda: language.stream([[1, 2]], 2), "tokens must be int64 or int32 (batch, seq_len), got list"),  # type: ignore[arg-type]
    (lambda: XPOS(8, "64"), "scale_base must be above 0 and finite, got '64'"),  # type: ignore[arg-type]
    (lambda: setattr(XPOS(8), "base", -1), "base must be above 0 and finite, got -1"),
    (lambda: setattr(XPOS(8), "max_wavelength", 1), "max_wavelength must leave a pair: at least 6.283, got 1"),
    (lambda: language.stream(words, 5, temperature=-1), "temperature must be 0 or above"),
    (lambda: language.stream(words, 5, top_p=2), "top_p must be above 0 and at most 1, got 2"),
    (lambda: language.generate(words, 5, lengths=[1, 2]), "lengths must be a tensor of integers, got [1, 2]"),  # type: ignore[arg-type]
    (lambda: language.stream(words, 5, lengths=torch.tensor([0, 6])), "lengths must be from 1 to seq_len=5, got [0"),
    (lambda: sample(table, math.nan), "temperature must be 0 or above and finite, got nan"),
    (lambda: sample(table, top_k=0), "top_k must be 1 or above and an integer, got 0"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "said"), CASES)
def test_errors_name_the_argument_its_value_and_what_is_allowed(call, said):
    with pytest.raises(ValueError, match=r"must|does not match") as raised:
        call()
    assert said in str(raised.value)


def test_integers_are_refused_under_autocast_too():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="must have the weights' dtype"):
        dense(h.long())
