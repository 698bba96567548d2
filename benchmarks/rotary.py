"""`python -m benchmarks.rotary --device cpu`: xPos on queries and keys, beside every peer, against a plain copy.

q and k are (1, 8, n, 64). All numbers are times relative to ours, compiled: above 1 is slower than ours. "copy" moves
the same bytes and is the floor. RoPE peers (transformers, liger-kernel) do less: they do not scale.
"""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Call, milliseconds, peers, publish, record
from xpos_zoo import XPOS

HEADS, HEAD_DIM, SCALE_BASE = 8, 64, 512
LENGTHS = [512, 4096, 16384, 65536]
Rotation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def ours(interleaved: bool, device: str) -> Rotation:
    xpos = XPOS(HEAD_DIM, SCALE_BASE, interleaved=interleaved).to(device)

    def rotate(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        at = torch.arange(q.shape[-2], device=q.device)
        return xpos.rotate(q, k, at, at, origin=q.shape[-2] // 2)

    return rotate


def file_of(package: str, path: str) -> ModuleType:
    """A file of a package whose `__init__` imports far more than the file needs."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"no module named {package!r}")
    spec = importlib.util.spec_from_file_location(f"{package}_file", Path(found.submodule_search_locations[0]) / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def torchscale_like(package: str, path: str, device: str) -> Rotation:
    """torchscale and zeta: one module, a call for queries and one for keys, heads in the batch."""
    xpos: nn.Module = file_of(package, path).XPOS(HEAD_DIM, SCALE_BASE).to(device)
    # Their tables come from the CPU whatever the input's device is.
    return lambda q, k: (
        xpos(q.flatten(0, 1)).view_as(q),
        xpos(k.flatten(0, 1), downscale=True).view_as(k),
    )


def rotary_embedding_torch(device: str) -> Rotation:
    from rotary_embedding_torch import RotaryEmbedding  # type: ignore[import-not-found]

    rotary = RotaryEmbedding(HEAD_DIM, use_xpos=True, xpos_scale_base=SCALE_BASE, cache_if_possible=False).to(device)
    return rotary.rotate_queries_and_keys


def x_transformers(device: str) -> Rotation:
    from x_transformers.x_transformers import (  # type: ignore[import-not-found]
        RotaryEmbedding,
        apply_rotary_pos_emb,
    )

    rotary = RotaryEmbedding(HEAD_DIM, use_xpos=True, scale_base=SCALE_BASE).to(device)

    def rotate(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        frequencies, scale = rotary.forward_from_seq_len(q.shape[-2])
        return apply_rotary_pos_emb(q, frequencies, scale), apply_rotary_pos_emb(k, frequencies, scale**-1)  # type: ignore

    return rotate


def llama(module: str, name: str, device: str) -> Rotation:
    """RoPE as Llama has it, by transformers' own function or another with its interface."""
    from transformers import LlamaConfig  # type: ignore[import-not-found]
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # type: ignore[import-not-found]

    rotate_both = getattr(importlib.import_module(module), name)
    config = LlamaConfig(hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS, head_dim=HEAD_DIM)
    rotary = LlamaRotaryEmbedding(config).to(device)

    def rotate(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return rotate_both(q, k, *rotary(q, torch.arange(q.shape[-2], device=q.device)[None]))

    return rotate


def contenders(device: str) -> dict[str, Callable[[], Rotation]]:
    """Those to be measured; each is made anew for each measurement, so that none keeps tables from an earlier one."""
    zoo: dict[str, Callable[[], Rotation]] = {
        "ours": lambda: ours(True, device),
        "ours, half-split": lambda: ours(False, device),
        "torchscale": lambda: torchscale_like("torchscale", "component/xpos_relative_position.py", device),
        "zeta": lambda: torchscale_like("zeta", "nn/embeddings/xpos_relative_position.py", device),
        "rotary-embedding-torch": lambda: rotary_embedding_torch(device),
        "x-transformers": lambda: x_transformers(device),
        "transformers (RoPE)": lambda: llama(
            "transformers.models.llama.modeling_llama", "apply_rotary_pos_emb", device
        ),
    }
    if device == "cuda":
        zoo["liger-kernel (RoPE)"] = lambda: llama("liger_kernel.transformers", "liger_rotary_pos_emb", device)
    return zoo


def as_call(rotation: Rotation, q: Tensor, k: Tensor, backward: bool) -> Call:
    if not backward:

        @torch.no_grad()
        def forward() -> Any:
            return rotation(q, k)

        return forward
    upstream = torch.randn_like(q), torch.randn_like(k)

    def both() -> Any:
        return torch.autograd.grad(rotation(q, k), (q, k), upstream)

    return both


def made(make: Callable[[], Rotation], q: Tensor, k: Tensor, backward: bool) -> Call:
    return as_call(make(), q, k, backward)


def copying(q: Tensor, k: Tensor, backward: bool) -> Call:
    to = torch.empty_like(q), torch.empty_like(k)

    def copy() -> None:
        for _ in range(1 + backward):
            with torch.no_grad():
                to[0].copy_(q)
                to[1].copy_(k)

    return copy


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rotary", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtypes", default=["float32", "bfloat16"], nargs="+")
    parser.add_argument("--lengths", default=LENGTHS, type=int, nargs="+")
    parser.add_argument("--seconds", default=1.0, type=float, help="time for each contender")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    title = "rotary" if len(options.dtypes) > 1 else f"rotary-{options.dtypes[0]}"
    settings = {"heads": HEADS, "head_dim": HEAD_DIM, "scale_base": SCALE_BASE}
    for dtype in options.dtypes:
        for length in options.lengths:
            for backward in (False, True):
                shape = (1, HEADS, length, HEAD_DIM)
                q, k = (
                    torch.randn(shape, dtype=getattr(torch, dtype), device=options.device).requires_grad_(backward)
                    for _ in range(2)
                )
                torch._dynamo.reset()
                calls = {"copy": copying(q, k, backward)}
                for name, make in contenders(options.device).items():
                    calls |= peers({name: partial(made, make, q, k, backward)})
                    if name in calls and "liger" not in name:  # that is a hand-written kernel
                        calls[f"{name}, compiled"] = as_call(torch.compile(make()), q, k, backward)
                times = milliseconds(calls, options.device, options.seconds)
                row = {"dtype": dtype, "length": length, "direction": "forward+backward" if backward else "forward"}
                rows.append(row | {name: each / times["ours, compiled"] for name, each in times.items()})
                if options.device == "cuda":
                    rows[-1]["ours, compiled, ms"] = times["ours, compiled"]
                print(rows[-1], flush=True)
                record(title, options.device, settings, rows)
    publish(title, options.device, settings, rows)


if __name__ == "__main__":
    main()
