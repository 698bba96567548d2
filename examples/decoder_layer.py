"""xPos in torch's own decoder: self-attention is replaced; cross-attention, norms and the rest stay torch's.

`nn.TransformerDecoderLayer` calls its `self_attn` as it would an `nn.MultiheadAttention`, so what takes its place has
that signature. A batch comes first (`batch_first=True`), and calls with a causal `tgt_mask` work as they did.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from xpos_zoo import XPOS, MultiHeadAttention, PositionModule


class CausalSelfAttention(nn.Module):
    batch_first = True  # nn.TransformerDecoder asks for it

    def __init__(self, old: nn.MultiheadAttention, positions: Callable[[int], PositionModule]):
        super().__init__()
        new = MultiHeadAttention(old.embed_dim, old.num_heads, positions=positions, bias=True, dropout=old.dropout)
        new = new.to(old.in_proj_weight).train(old.training)
        # torch keeps the weights of queries, keys and values in one matrix.
        weights, biases = old.in_proj_weight.chunk(3), old.in_proj_bias.chunk(3)
        for projection, weight, bias in zip((new.q_proj, new.k_proj, new.v_proj), weights, biases, strict=True):
            projection.load_state_dict({"weight": weight, "bias": bias})
        new.out_proj.load_state_dict(old.out_proj.state_dict())
        self.attention = new

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask=None, key_padding_mask=None, is_causal=False, **_
    ) -> tuple[Tensor, None]:
        if key_padding_mask is not None or (attn_mask is not None and not is_causal):
            raise ValueError("self-attention is causal here and takes no other mask")
        return self.attention(query), None


def swapped(decoder: nn.TransformerDecoder, positions: Callable[[int], PositionModule]) -> nn.TransformerDecoder:
    """A copy whose layers attend to themselves with these positions, with the weights that they have."""
    decoder = copy.deepcopy(decoder)
    for layer in decoder.layers:
        assert isinstance(layer.self_attn, nn.MultiheadAttention)
        layer.self_attn = CausalSelfAttention(layer.self_attn, positions)
    return decoder


def main() -> dict[str, float]:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(64, 4, 128, batch_first=True, norm_first=True, dtype=torch.float64)
    theirs = nn.TransformerDecoder(layer, num_layers=2).eval()
    target = torch.randn(2, 20, 64, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(2, 7, 64, dtype=torch.float64, requires_grad=True)
    mask = nn.Transformer.generate_square_subsequent_mask(20, dtype=torch.float64)
    expected = theirs(target, memory, tgt_mask=mask)

    without = swapped(theirs, lambda head_dim: PositionModule([0] * (head_dim // 2)))  # nothing turns, nothing decays
    ours = swapped(theirs, XPOS)
    output = ours(target, memory, tgt_mask=mask)
    of_target, of_memory = torch.autograd.grad(output[:, :10].sum(), (target, memory))
    differences = [(found - expected).abs().max().item() for found in (without(target, memory), output)]
    return {
        "without positions, largest difference from torch's": differences[0],
        "with xPos, largest difference from torch's": differences[1],
        "gradient of the first 10 outputs for their tokens": of_target[:, :10].norm().item(),
        "gradient of the first 10 outputs for later tokens": of_target[:, 10:].norm().item(),
        "gradient of the first 10 outputs for the memory": of_memory.norm().item(),
    }


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:50} {value:.2g}")
