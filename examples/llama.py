"""A Llama of transformers whose attention is replaced, and nothing else: the same weights, the same logits.

Then xPos takes the place of its rotary embedding: the loss hardly changes, training goes on from there, and the model
reads on where Llama breaks. All of it without the cache of transformers (`use_cache=False`) and without padding.
"""

import copy
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM  # type: ignore[import-not-found]
from transformers.models.llama.modeling_llama import LlamaAttention  # type: ignore[import-not-found]

from xpos_zoo import XPOS, MultiHeadAttention, PositionModule, RotaryEmbedding

LENGTH, THETA = 64, 500_000.0  # trained length; Llama 3's base


class OurAttention(nn.Module):
    """Called as transformers calls its own, with the projections of `old`."""

    def __init__(self, old: LlamaAttention, positions: Callable[[int], PositionModule]):
        super().__init__()
        heads, kv_heads = old.config.num_attention_heads, old.config.num_key_value_heads
        self.attention = MultiHeadAttention(
            old.config.hidden_size, heads, num_kv_heads=kv_heads, head_dim=old.head_dim, positions=positions
        )
        self.attention.q_proj, self.attention.k_proj = old.q_proj, old.k_proj
        self.attention.v_proj, self.attention.out_proj = old.v_proj, old.o_proj

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **others) -> tuple[Tensor, None]:
        if attention_mask is not None or others.get("cache") is not None or others.get("past_key_values") is not None:
            raise ValueError("call with use_cache=False, without padding, with attn_implementation='sdpa'")
        return self.attention(hidden_states), None


def swapped(llama: LlamaForCausalLM, positions: Callable[[int], PositionModule]) -> LlamaForCausalLM:
    llama = copy.deepcopy(llama)
    for name, module in list(llama.named_modules()):
        if isinstance(module, LlamaAttention):
            llama.set_submodule(name, OurAttention(module, positions))
    return llama


def float64_angles(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Llama's cosines and sines without its rounding: it computes angles in float32, even in a float64 model."""
    frequencies = THETA ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    angles = position_ids[..., None] * torch.cat((frequencies, frequencies))
    return angles.cos(), angles.sin()


def train(llama: LlamaForCausalLM, text: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(llama.parameters(), lr=3e-3)
    for _ in range(steps):
        rows = text[torch.randint(len(text) - LENGTH, (16, 1)) + torch.arange(LENGTH)]
        optimizer.zero_grad()
        llama(rows, labels=rows).loss.backward()
        optimizer.step()


@torch.no_grad()
def loss(llama: LlamaForCausalLM, rows: Tensor) -> float:
    """Nats a byte, of all bytes but the first of each row."""
    return llama(rows, labels=rows).loss.item()


def main() -> dict[str, float]:
    torch.manual_seed(0)
    text = torch.tensor(list(Path(inspect.__file__).read_bytes()))  # a long file of Python
    held_out = text[-4096:]
    sizes: dict[str, Any] = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "rope_theta": THETA}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope, use_cache=False))
    train(llama, text[:-4096], 100)

    # Llama pairs each channel with the one half a head on, not with its neighbour.
    ours = swapped(llama, partial(RotaryEmbedding, base=THETA, interleaved=False))
    exact = copy.deepcopy(llama).double()
    exact.model.rotary_emb.forward = float64_angles
    tokens, claims = held_out.view(-1, 1024), {}
    with torch.no_grad():
        logits = exact(tokens).logits
        for name, model in {"Llama": llama, "ours": ours}.items():
            for dtype in ("float", "bfloat16"):
                error = getattr(copy.deepcopy(model), dtype)()(tokens).logits - logits
                claims[f"error, {name}, {dtype}"] = (error.norm() / logits.norm()).item()

    xpos = swapped(llama, partial(XPOS, scale_base=LENGTH / 2, base=THETA, interleaved=False))
    rows, one_row = held_out.view(-1, LENGTH), held_out[None]
    claims["loss, Llama"] = loss(llama, rows)
    claims["loss, xPos, same weights"] = loss(xpos, rows)
    train(xpos, text[:-4096], 25)
    claims["loss, xPos, 25 steps later"] = loss(xpos, rows)
    claims["loss at 4096, Llama"] = loss(llama, one_row)
    for module in xpos.modules():
        if isinstance(module, MultiHeadAttention):
            module.block_size = LENGTH // 2
    claims["loss at 4096, xPos, blockwise"] = loss(xpos, one_row)
    return claims


if __name__ == "__main__":
    torch.set_num_threads(1)  # tensors are small: threads would mostly wait for each other
    for name, value in main().items():
        print(f"{name:30} {value:.3g}")
