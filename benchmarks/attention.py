"""`python -m benchmarks.attention --device cpu`: an attention block, dense and blockwise, beside its peers.

Batch 1, 512 features, 8 heads; blocks of 512. All are compiled where they compile; all times are relative to ours of
the same row: above 1 is slower than ours. "no positions" is our own block without rotating, the bar for what rotating
costs. Contenders that attend to everything stop at `--dense-limit`; 0 leaves blockwise attention alone.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Call, milliseconds, peak_megabytes, peers, publish, record, training
from study.encodings import NoPositions
from xpos_zoo import XPOS, MultiHeadAttention

EMBED_DIM, HEADS, BLOCK = 512, 8, 512
SETTINGS = {"embed_dim": EMBED_DIM, "num_heads": HEADS, "block_size": BLOCK}
LENGTHS = [1024, 2048, 4096, 8192, 16384, 65536, 131072]
Block = Callable[[Tensor], Tensor]


class Torchscale(nn.Module):
    def __init__(self, length: int):
        super().__init__()
        from torchscale.component.multihead_attention import MultiheadAttention  # type: ignore[import-not-found]

        options = SimpleNamespace(multiway=False, xpos_rel_pos=True, xpos_scale_base=BLOCK, layernorm_eps=1e-5)
        self.attention = MultiheadAttention(options, EMBED_DIM, HEADS, self_attention=True)
        self.register_buffer("mask", torch.full((length, length), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, attn_mask=self.mask)[0]


class XTransformers(nn.Module):
    def __init__(self):
        super().__init__()
        from x_transformers.x_transformers import Attention, RotaryEmbedding  # type: ignore[import-not-found]

        self.rotary = RotaryEmbedding(EMBED_DIM // HEADS, use_xpos=True, scale_base=BLOCK)
        self.attention = Attention(EMBED_DIM, heads=HEADS, dim_head=EMBED_DIM // HEADS, causal=True, flash=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, rotary_pos_emb=self.rotary.forward_from_seq_len(x.shape[1]))


class Llama(nn.Module):
    """Rotary without decay."""

    def __init__(self):
        super().__init__()
        from transformers import LlamaConfig  # type: ignore[import-not-found]
        from transformers.models.llama.modeling_llama import (  # type: ignore[import-not-found]
            LlamaAttention,
            LlamaRotaryEmbedding,
        )

        config = LlamaConfig(hidden_size=EMBED_DIM, num_attention_heads=HEADS, attn_implementation="sdpa")  # type: ignore
        self.rotary, self.attention = LlamaRotaryEmbedding(config), LlamaAttention(config, layer_idx=0)

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1], device=x.device)[None]
        return self.attention(x, position_embeddings=self.rotary(x, at), attention_mask=None)[0]


class Torch(nn.Module):
    """torch.nn.MultiheadAttention: without positions."""

    def __init__(self, length: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(EMBED_DIM, HEADS, bias=False, batch_first=True)
        self.register_buffer("mask", torch.ones(length, length, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, attn_mask=self.mask, is_causal=True, need_weights=False)[0]


def our_block(positions: Callable[[int], Any], block_size: int | None) -> nn.Module:
    return MultiHeadAttention(EMBED_DIM, HEADS, positions=positions, block_size=block_size)


def contenders(length: int, dense: bool) -> dict[str, Callable[[], nn.Module]]:
    xpos = partial(XPOS, scale_base=BLOCK)
    zoo: dict[str, Callable[[], nn.Module]] = {
        "ours, blockwise": partial(our_block, xpos, BLOCK),
        "no positions, blockwise": partial(our_block, NoPositions, BLOCK),
    }
    if dense:
        zoo |= {
            "ours, dense": partial(our_block, xpos, None),
            "half-split, dense": partial(our_block, partial(xpos, interleaved=False), None),
            "no positions, dense": partial(our_block, NoPositions, None),
            "transformers Llama (RoPE)": Llama,
            "nn.MultiheadAttention": partial(Torch, length),
            "torchscale": partial(Torchscale, length),
            "x-transformers": XTransformers,
        }
    return zoo


def as_call(make: Callable[[], nn.Module], x: Tensor, backward: bool) -> Call:
    module = make().to(x.device, x.dtype)
    compiled = torch.compile(module)
    if backward:
        return training(compiled, x)

    @torch.no_grad()
    def forward() -> Any:
        return compiled(x)

    return forward


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--lengths", default=LENGTHS, type=int, nargs="+")
    parser.add_argument("--dense-limit", default=8192, type=int, help="longest length of dense contenders")
    parser.add_argument("--seconds", default=2.0, type=float, help="time for each contender")
    options = parser.parse_args()
    what = "attention" if options.dense_limit >= min(options.lengths) else "attention-blockwise"
    rows: list[dict[str, Any]] = []
    settings: dict[str, Any] = {}
    grown: dict[str, list[tuple[int, float]]] = {}
    for length in options.lengths:
        for backward in (False, True):
            torch._dynamo.reset()
            x = torch.randn(1, length, EMBED_DIM, dtype=getattr(torch, options.dtype), device=options.device)
            x.requires_grad_(backward)
            makers = contenders(length, dense=length <= options.dense_limit)
            calls = peers({name: partial(as_call, make, x, backward) for name, make in makers.items()})
            times = milliseconds(calls, options.device, options.seconds)
            memory = peak_megabytes(calls["ours, blockwise"], options.device)
            bar = times.get("ours, dense", times["ours, blockwise"])
            direction = "forward+backward" if backward else "forward"
            for name in ("ours, blockwise", "ours, dense"):
                if name in times:
                    grown.setdefault(f"{name}, {direction}, time", []).append((length, times[name]))
            if memory:
                grown.setdefault(f"ours, blockwise, {direction}, peak memory", []).append((length, memory))
            row = {"length": length, "direction": direction}
            own = grown[f"ours, blockwise, {direction}, time"]
            row["blockwise, against its own first"] = own[-1][1] / own[0][1]
            row["blockwise / no positions"] = times["ours, blockwise"] / times["no positions, blockwise"]
            row["blockwise, peak MB"] = memory
            for name, each in times.items():
                if name in ("ours, blockwise", "no positions, blockwise") and "ours, dense" not in times:
                    continue
                if name != "ours, dense":
                    row[f"{name} / ours, dense"] = each / bar
            if options.device == "cuda":
                row |= {f"{name}, ms": each for name, each in times.items()}
            rows.append(row)
            print(row, flush=True)
            powers = {name: exponent(points) for name, points in grown.items()}
            settings = SETTINGS | {"dtype": options.dtype, "grows as length to the power of": powers}
            record(f"{what}-{options.dtype}", options.device, settings, rows)
    publish(f"{what}-{options.dtype}", options.device, settings, rows)
    for name, power in settings["grows as length to the power of"].items():
        print(f"{name} grows as length^{power}")


def exponent(points: list[tuple[int, float]]) -> float | None:
    """The slope of a line through the logarithms of lengths beyond two blocks and of what was measured there."""
    beyond = [(math.log(length), math.log(value)) for length, value in points if length > 2 * BLOCK and value > 0]
    return round(statistics.linear_regression(*zip(*beyond, strict=True)).slope, 2) if len(beyond) > 1 else None


if __name__ == "__main__":
    main()
