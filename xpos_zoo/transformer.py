"""A small pre-norm decoder language model of `MultiHeadAttention` blocks.

Axes: b batch, n sequence.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from xpos_zoo.attention import MultiHeadAttention, Temperature, require_sizes
from xpos_zoo.dense import PositionModule
from xpos_zoo.xpos import XPOS

NORM_EPS = torch.finfo(torch.float32).eps  # RMSNorm's default, but in float64 too, so that all dtypes compute the same


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate x) * up x)."""

    def __init__(self, embed_dim: int, hidden_dim: int):
        super().__init__()
        self.gate_proj = nn.Linear(embed_dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(embed_dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, attention: MultiHeadAttention, hidden_dim: int, dropout: float):
        super().__init__()
        self.attention_norm = nn.RMSNorm(attention.embed_dim, NORM_EPS)
        self.attention = attention
        self.feed_forward_norm = nn.RMSNorm(attention.embed_dim, NORM_EPS)
        self.feed_forward = FeedForward(attention.embed_dim, hidden_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Transformer(nn.Module):
    """Causal language model: tokens (b, n) give logits (b, n, vocab_size).

    RMSNorm before attention and before a SwiGLU feed-forward network, no biases, output weights tied to the embedding.

    Args:
        vocab_size, embed_dim, num_layers, num_heads: sizes.
        num_kv_heads, head_dim, positions, block_size: see `MultiHeadAttention`.
        hidden_dim: width of the feed-forward network; by default 8/3 embed_dim, rounded up to a multiple of 32.
        dropout: probability of dropping an attention weight, and a feature before it joins the residual stream.
        tie_embeddings: whether the output projection is the embedding's transpose.

    Raises:
        ValueError: for a size that is not positive or does not divide as `MultiHeadAttention` says.
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        num_layers: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        positions: Callable[[int], PositionModule] = XPOS,
        block_size: int | None = None,
        hidden_dim: int | None = None,
        dropout: float = 0.0,
        tie_embeddings: bool = True,
    ):
        super().__init__()
        require_sizes(vocab_size=vocab_size, embed_dim=embed_dim, num_layers=num_layers)
        if hidden_dim is None:
            hidden_dim = -(-8 * embed_dim // (3 * 32)) * 32
        require_sizes(hidden_dim=hidden_dim)
        self.vocab_size = vocab_size
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.layers = nn.ModuleList(
            DecoderLayer(
                MultiHeadAttention(
                    embed_dim,
                    num_heads,
                    num_kv_heads=num_kv_heads,
                    head_dim=head_dim,
                    positions=positions,
                    block_size=block_size,
                    dropout=dropout,
                ),
                hidden_dim,
                dropout,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.RMSNorm(embed_dim, NORM_EPS)
        self.head = nn.Linear(embed_dim, vocab_size, bias=False)
        if tie_embeddings:
            self.head.weight = self.embedding.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """GPT-2's initialisation: normal, 0.02; what is added to the residual stream 1/sqrt(2 num_layers) of that."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            if name.endswith(("out_proj.weight", "down_proj.weight")):
                with torch.no_grad():
                    parameter /= (2 * len(self.layers)) ** 0.5

    @property
    def attentions(self) -> list[MultiHeadAttention]:
        """The attention of each layer."""
        return [layer.attention for layer in self.layers]  # type: ignore[union-attr]

    @property
    def block_size(self) -> int | None:
        """None for dense attention, else the block size of blockwise attention, in all layers."""
        return self.attentions[0].block_size

    @block_size.setter
    def block_size(self, value: int | None) -> None:
        for attention in self.attentions:
            attention.block_size = value

    @property
    def temperature(self) -> Temperature | None:
        """The `Temperature` of queries beyond the trained length in all layers, or None."""
        return self.attentions[0].temperature

    @temperature.setter
    def temperature(self, value: Temperature | None) -> None:
        for attention in self.attentions:
            attention.temperature = value

    def forward(self, tokens: Tensor) -> Tensor:
        """Next-token logits (b, n, vocab_size) for tokens (b, n).

        Raises:
            ValueError: tokens has another shape or is neither int64 nor int32.
        """
        if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"tokens must be int64 or int32 (batch, seq_len), got {tokens.dtype} {tuple(tokens.shape)}"
            )
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))
