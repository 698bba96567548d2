"""`python -m benchmarks.decode --device cpu`: time of one decoded token against its position.

One attention block, batch 1: ours blockwise, ours dense, the same with the recipe of configs/long.yaml, a cache of raw
keys that is rotated afresh at every step (torchscale's way), and x-transformers' Attention with rotary_xpos, which does
so too. Ours and the raw keys are compiled; x-transformers, whose cache grows by concatenation, is not. On a CPU only
the ratios mean anything.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.harness import milliseconds, peers, publish, record
from xpos_zoo import XPOS, MultiHeadAttention, ScaleInvariant

POSITIONS = [1024, 4096, 16384, 65536, 131072]


class Decoding:
    """Contenders that decode the token at `position` (from 1) again and again."""

    def __init__(self, position: int, embed_dim: int, num_heads: int, block_size: int, dtype: torch.dtype, device: str):
        self.position, self.embed_dim, self.num_heads, self.block_size = position, embed_dim, num_heads, block_size
        self.dtype, self.device = dtype, device
        self.x = torch.randn(1, 1, embed_dim, dtype=dtype, device=device)

    def keys(self, slots: int) -> Tensor:
        return torch.randn(1, self.num_heads, slots, self.embed_dim // self.num_heads, dtype=self.dtype).to(self.device)

    def block(self, block_size: int | None, max_wavelength: int | None = None, **options: Any) -> MultiHeadAttention:
        positions = partial(XPOS, scale_base=self.block_size, max_wavelength=max_wavelength)
        options |= {"positions": positions, "block_size": block_size}
        module = MultiHeadAttention(self.embed_dim, self.num_heads, **options)
        return module.to(self.device, self.dtype).requires_grad_(False)

    def ours(self, module: MultiHeadAttention, mode: str | None = None) -> Callable[[], Any]:
        cache = module.make_cache(1, self.position)
        cache[0].k.copy_(self.keys(cache[0].num_slots) / 100)
        compiled = torch.compile(module, fullgraph=True, mode=mode)

        def step() -> Tensor:
            cache.length.fill_(self.position - 1)
            return compiled(self.x, cache=cache)

        return step

    def raw_keys(self) -> Callable[[], Any]:
        module = self.block(None)
        k, v = self.keys(self.position), self.keys(self.position)

        def attend(x: Tensor, at: Tensor) -> Tensor:
            q, new_k, new_v = (
                linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                for linear in (module.q_proj, module.k_proj, module.v_proj)
            )
            k.index_copy_(2, at, new_k)
            v.index_copy_(2, at, new_v)
            q, rotated = module.positions.rotate(q, k, at, torch.arange(self.position, device=x.device), origin=at)
            attended = scaled_dot_product_attention(q, rotated, v)
            return module.out_proj(attended.transpose(1, 2).flatten(2))

        compiled = torch.compile(attend, fullgraph=True)
        at = torch.tensor([self.position - 1], device=self.device)
        return lambda: compiled(self.x, at)

    def x_transformers(self) -> Callable[[], Any]:
        from x_transformers.attend import Intermediates  # type: ignore[import-not-found]
        from x_transformers.x_transformers import Attention, RotaryEmbedding  # type: ignore[import-not-found]

        head_dim = self.embed_dim // self.num_heads
        attention = Attention(self.embed_dim, heads=self.num_heads, dim_head=head_dim, causal=True, flash=True)
        attention = attention.to(self.device, self.dtype).requires_grad_(False)
        rotary = RotaryEmbedding(head_dim, use_xpos=True, scale_base=self.block_size).to(self.device)
        cached = Intermediates(cached_kv=(self.keys(self.position - 1), self.keys(self.position - 1)))
        at = torch.arange(self.position, device=self.device)
        return lambda: attention(self.x, rotary_pos_emb=rotary(at), cache=cached, return_intermediates=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--positions", type=int, nargs="+", default=POSITIONS)
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each contender")
    options = parser.parse_args()
    settings = {"embed_dim": 512, "num_heads": 8, "block_size": 512, "dtype": options.dtype}
    rows, first = [], None
    for position in options.positions:
        torch._dynamo.reset()
        case = Decoding(position, 512, 8, 512, getattr(torch, options.dtype), options.device)
        contenders = {
            "ours, blockwise": case.ours(case.block(512)),
            "ours, dense": case.ours(case.block(None)),
            "ours, dense, scale-invariant": case.ours(case.block(None, 1024, distance_bias=ScaleInvariant())),
            "raw keys, rotated afresh": case.raw_keys(),
        }
        if options.device == "cuda":
            contenders["ours, dense, CUDA graphs"] = case.ours(case.block(None), "reduce-overhead")
        contenders |= peers({"x-transformers": case.x_transformers})
        times = milliseconds(contenders, options.device, options.seconds)
        first = times["ours, blockwise"] if first is None else first
        base = dict.fromkeys(times, "ours, blockwise") | {"ours, dense, scale-invariant": "ours, dense"}
        ratios = {
            f"{name} / {base[name]}": each / times[base[name]] for name, each in times.items() if name != base[name]
        }
        rows.append(
            {"position": position, f"ours, blockwise / at {options.positions[0]}": times["ours, blockwise"] / first}
            | ratios
            | ({f"{name}, ms": each for name, each in times.items()} if options.device == "cuda" else {})
        )
        print(rows[-1], flush=True)
        record(f"decode-{options.dtype}", options.device, settings, rows)
    publish(f"decode-{options.dtype}", options.device, settings, rows)


if __name__ == "__main__":
    main()
