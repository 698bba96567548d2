"""`python -m benchmarks.launches --device cuda`: how many kernels a compiled forward launches, read from its code.

Four layers of 512 features and 8 heads, bfloat16, batch 2, 1024 tokens, blocks of 256, no gradients. Counted are the
compiler's own kernels, matrix products and attention kernels in the code that it generates; nothing is timed.
"""

import argparse
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch._inductor.utils import run_and_get_code

from benchmarks.harness import publish, record
from xpos_zoo import XPOS, MultiHeadAttention, Transformer

CALLS = {
    "kernels": r"^\s*(?:triton_\w+\.run|cpp_fused\w*)\(",
    "products": r"extern_kernels\.\w+\(",
    "attention": r"torch\.ops\.aten\._scaled_dot_product\w+\.default\(",
}
WIDTH, HEADS, TOKENS, BLOCK = 512, 8, 1024, 256


def counted(function: Callable[..., Any], *args: Any) -> dict[str, int]:
    torch._dynamo.reset()
    with torch.no_grad():
        _, codes = run_and_get_code(torch.compile(function, fullgraph=True), *args)
    # The definitions of kernels stand before the function that calls them.
    body = "\n".join(re.split(r"def call\(", code)[-1] for code in codes)
    counts = {name: len(re.findall(pattern, body, flags=re.MULTILINE)) for name, pattern in CALLS.items()}
    return counts | {"launches": sum(counts.values())}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    device = parser.parse_args().device
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    q, k = (torch.randn(2, TOKENS, HEADS, WIDTH // HEADS, **options) for _ in range(2))
    xpos, at = XPOS(WIDTH // HEADS).to(device), torch.arange(TOKENS, device=device)
    settings = {"embed_dim": WIDTH, "heads": HEADS, "tokens": TOKENS, "block_size": BLOCK}
    rows = [{"compiled": "q and k rotated"} | counted(lambda q, k: xpos.rotate(q, k, at[:, None], at[:, None]), q, k)]
    words = torch.zeros(2, TOKENS, dtype=torch.int64, device=device)
    for name, block_size in (("dense", None), ("blockwise", BLOCK)):
        positions = partial(XPOS, scale_base=TOKENS / 2)
        block = MultiHeadAttention(WIDTH, HEADS, positions=positions, block_size=block_size).to(**options)
        model = Transformer(256, WIDTH, 4, HEADS, positions=positions, block_size=block_size).to(**options)
        x, cache = torch.randn(2, TOKENS, WIDTH, **options), model.make_cache(2, TOKENS)
        rows.append({"compiled": f"block, {name}"} | counted(block, x))
        rows.append({"compiled": f"4-layer model, {name}"} | counted(model, words))
        rows.append({"compiled": f"4-layer model, a decoded token, {name}"} | counted(model, words[:, :1], cache))
        record("launches", device, settings, rows)
    publish("launches", device, settings, rows)


if __name__ == "__main__":
    main()
