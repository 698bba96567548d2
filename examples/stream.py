"""A stream that never ends: blockwise attention keeps two blocks of keys, so every token costs what the first one did.

And it is exact: the logits of each token are those of one forward over all tokens so far.
"""

import copy
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from xpos_zoo import KeyValueCache, Transformer

LENGTH = 500


def endless(model: Transformer, token: Tensor, cache: KeyValueCache) -> Iterator[tuple[Tensor, Tensor]]:
    """After tokens (b,): the next logits (b, vocab_size) and the tokens drawn from them, and so on for ever."""
    while True:
        logits = model(token[:, None], cache)[:, -1]
        token = torch.multinomial(logits.softmax(-1), 1)[:, 0]
        yield logits, token


def main() -> dict[str, float]:
    torch.manual_seed(0)
    model = Transformer(256, embed_dim=64, num_layers=2, num_heads=4, block_size=16).eval()
    cache = model.make_cache(batch_size=1)
    start = torch.zeros(1, dtype=torch.int64)
    stream = endless(model, start, cache)
    claims: dict[str, float] = {}

    def measured_step() -> tuple[Tensor, Tensor]:
        with FlopCounterMode(display=False) as counter:
            step = next(stream)
        cost = {"operations": counter.get_total_flops(), "bytes": sum(buffer.nbytes for buffer in cache.buffers())}
        claims.update({f"{what}, token {int(cache.length)}": value for what, value in cost.items()})
        return step

    steps = [measured_step(), *islice(stream, LENGTH - 2), measured_step()]

    logits = torch.cat([logits for logits, _ in steps])
    tokens = torch.stack([start, *(token for _, token in steps[:-1])], dim=1)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(tokens)[0]
        claims["error of the stream"] = (logits - exact).abs().max().item()
        claims["error of one forward"] = (model(tokens)[0] - exact).abs().max().item()
    return claims


if __name__ == "__main__":
    torch.set_num_threads(1)  # tensors are small: threads would mostly wait for each other
    for name, value in main().items():
        print(f"{name:22} {value:.6g}")
