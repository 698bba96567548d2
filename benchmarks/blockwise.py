"""`python -m benchmarks.blockwise --device cuda --dtype bfloat16`: which backend carries blockwise attention best.

q, k and v are (1, n, 8, 64), blocks of 512. "ours" is what `MultiHeadAttention` does between its projections. The
others differ in what attends to the windows of two blocks, whose mask is causal from the lower right corner; they take
the first block apart. "dense" is causal attention to everything. All are compiled; a contender whose output is not ours
to the rounding of the dtype is an error. Times are relative to ours: below 1 is faster.
"""

import argparse
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.harness import Call, milliseconds, peers, publish, record, training
from xpos_zoo import XPOS
from xpos_zoo.plan import make_case
from xpos_zoo.settings import AttentionSettings, BatchLayout
from xpos_zoo.visibility import AttentionPattern

HEADS, HEAD_DIM, BLOCK = 8, 64, 512
LENGTHS = [2048, 8192, 65536]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(xpos: XPOS, block_size: int | None) -> Attention:
    settings = AttentionSettings(xpos, AttentionPattern(block_size))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        plan = make_case(settings, BatchLayout(len(q), q.shape[1], q.dtype, q.device), None)
        return plan.attend(q, k, v, settings, None)

    return attention


def in_windows(xpos: XPOS, kernel: Attention) -> Attention:
    """Blockwise attention by an attention of blocks (j, h, w, d) to their windows (j, h, 2 w, d)."""
    dense = ours(xpos, None)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = dense(q[:, :BLOCK], k[:, :BLOCK], v[:, :BLOCK])
        at = torch.arange(-BLOCK, BLOCK, device=q.device)
        q, k, v = (rearrange(t, "b (j w) h d -> (b j) h w d", w=BLOCK) for t in (q, k, v))
        q, k, v = q[1:], *(torch.cat((t[:-1], t[1:]), dim=2) for t in (k, v))
        q, k = xpos.rotate(q, k, at[BLOCK:], at)
        rest = rearrange(kernel(q, k, v), "(b j) h w d -> b (j w) h d", b=len(first))
        return torch.cat((first, rest), dim=1)

    return attention


def lower_right(xpos: XPOS) -> Attention:
    from torch.nn.attention.bias import causal_lower_right

    bias = causal_lower_right(BLOCK, 2 * BLOCK)  # inside a graph it cannot be made
    return in_windows(xpos, lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=bias))


def masked(xpos: XPOS) -> Attention:
    mask = torch.ones(BLOCK, 2 * BLOCK, dtype=torch.bool, device=xpos.scale.device).tril(BLOCK)
    return in_windows(xpos, lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask))


def varlen(xpos: XPOS) -> Attention:
    from torch.nn.attention.varlen import varlen_attn  # half precision on CUDA alone

    window = "window_size" in inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if window else {"is_causal": True}

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        starts = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
        q, k, v = (rearrange(t, "j h w d -> (j w) h d") for t in (q, k, v))
        attended = varlen_attn(q, k, v, starts * BLOCK, starts * 2 * BLOCK, BLOCK, 2 * BLOCK, **causal)
        assert isinstance(attended, Tensor)
        return rearrange(attended, "(j w) h d -> j h w d", w=BLOCK)

    return in_windows(xpos, kernel)


def flex(xpos: XPOS) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query + BLOCK

    mask = create_block_mask(visible, None, None, BLOCK, 2 * BLOCK, device=xpos.scale.device)

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attended = flex_attention(q, k, v, block_mask=mask)
        assert isinstance(attended, Tensor)
        return attended

    return in_windows(xpos, kernel)


def contenders(device: str, dense: bool) -> dict[str, Callable[[], Attention]]:
    xpos = XPOS(HEAD_DIM, BLOCK).to(device)
    zoo: dict[str, Callable[[], Attention]] = {
        "ours": partial(ours, xpos, BLOCK),
        "lower right": partial(lower_right, xpos),
        "mask": partial(masked, xpos),
    }
    if device == "cuda":
        zoo |= {"varlen": partial(varlen, xpos), "flex": partial(flex, xpos)}
    if dense:
        zoo["dense"] = partial(ours, xpos, None)
    return zoo


def as_call(make: Callable[[], Attention], inputs: tuple[Tensor, Tensor, Tensor], expected: Tensor | None) -> Call:
    compiled = torch.compile(make())
    if inputs[0].requires_grad:
        call = training(compiled, *inputs)
        call()  # compiles, or fails
        return call

    @torch.no_grad()
    def forward() -> Tensor:
        return compiled(*inputs)

    if expected is not None:
        # Of two roundings of the output, and of the weights that its sum is made of.
        eps = torch.finfo(expected.dtype).eps
        torch.testing.assert_close(forward(), expected, rtol=4 * eps, atol=4 * eps * float(inputs[2].abs().max()))
    return forward


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.blockwise", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--lengths", default=LENGTHS, type=int, nargs="+", help="multiples of the block")
    parser.add_argument("--dense-limit", default=8192, type=int, help="longest length of dense attention")
    parser.add_argument("--seconds", default=1.0, type=float, help="time for each contender")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    settings = {"heads": HEADS, "head_dim": HEAD_DIM, "block_size": BLOCK, "dtype": options.dtype}
    for length in options.lengths:
        for backward in (False, True):
            torch._dynamo.reset()
            shape = (1, length, HEADS, HEAD_DIM)
            dtype = getattr(torch, options.dtype)
            q, k, v = (torch.randn(shape, dtype=dtype, device=options.device, requires_grad=backward) for _ in range(3))
            inputs = q, k, v
            makers = contenders(options.device, length <= options.dense_limit)
            expected = None if backward else makers["ours"]()(*inputs)
            blockwise = {
                name: partial(as_call, make, inputs, None if name == "dense" else expected)
                for name, make in makers.items()
            }
            times = milliseconds(peers(blockwise, failure=Exception), options.device, options.seconds)
            row = {"length": length, "direction": "forward+backward" if backward else "forward"}
            row |= {f"{name} / ours": each / times["ours"] for name, each in times.items() if name != "ours"}
            if options.device == "cuda":
                row |= {f"{name}, ms": each for name, each in times.items()}
            rows.append(row)
            print(row, flush=True)
            record(f"blockwise-{options.dtype}", options.device, settings, rows)
    publish(f"blockwise-{options.dtype}", options.device, settings, rows)


if __name__ == "__main__":
    main()
