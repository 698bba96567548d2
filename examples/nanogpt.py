"""nanoGPT with xPos: train on rows of 64 bytes, then read 4096 in one go with the same weights.

Two changes to nanoGPT's model: `MultiHeadAttention` in its Block, and no table of learned positions, which would end
where training did. (Its `block_size` is the training length, LENGTH here; ours is the block of blockwise attention.)
`plan_attention` makes position tables and masks once for all blocks.
"""

import inspect
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from xpos_zoo import XPOS, LayerPlan, MultiHeadAttention, plan_attention

LENGTH = 64
EMBED_DIM, NUM_HEADS, NUM_LAYERS = 64, 4, 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1 = nn.LayerNorm(EMBED_DIM)
        self.attn = MultiHeadAttention(EMBED_DIM, NUM_HEADS, positions=partial(XPOS, scale_base=LENGTH / 2))
        self.ln_2 = nn.LayerNorm(EMBED_DIM)
        self.mlp = nn.Sequential(nn.Linear(EMBED_DIM, 4 * EMBED_DIM), nn.GELU(), nn.Linear(4 * EMBED_DIM, EMBED_DIM))

    def forward(self, x: Tensor, plan: LayerPlan) -> Tensor:
        x = x + self.attn.attend(self.ln_1(x), plan)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(256, EMBED_DIM)
        self.h = nn.ModuleList(Block() for _ in range(NUM_LAYERS))
        self.ln_f = nn.LayerNorm(EMBED_DIM)
        self.lm_head = nn.Linear(EMBED_DIM, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens)
        for block, plan in zip(self.h, plan_attention([block.attn for block in self.h], x), strict=True):
            x = block(x, plan)
        return self.lm_head(self.ln_f(x))


def loss(model: nn.Module, rows: Tensor) -> Tensor:
    """Nats a byte, of all bytes but the first of each row."""
    return cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def main() -> dict[str, float]:
    torch.manual_seed(0)
    text = torch.tensor(list(Path(inspect.__file__).read_bytes()))  # a long file of Python
    train, held_out = text[:-4097], text[-4097:]
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        starts = torch.randint(len(train) - LENGTH, (16, 1))
        optimizer.zero_grad()
        loss(model, train[starts + torch.arange(LENGTH + 1)]).backward()
        optimizer.step()

    with torch.no_grad():
        losses = {"64 rows of 64 bytes": loss(model, held_out.unfold(0, LENGTH + 1, LENGTH)).item()}
        losses["one row of 4096, dense"] = loss(model, held_out[None]).item()
        for module in model.modules():
            if isinstance(module, MultiHeadAttention):
                module.block_size = LENGTH // 2
        losses["one row of 4096, blockwise"] = loss(model, held_out[None]).item()
    return losses


if __name__ == "__main__":
    torch.set_num_threads(1)  # tensors are small: threads would mostly wait for each other
    print("Loss on held-out text, in nats a byte:")
    for name, value in main().items():
        print(f"  {name:27} {value:.3f}")
