"""A small pre-norm decoder language model of `MultiHeadAttention` blocks.

Axes: b batch, n sequence.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, silu
from torch.utils.checkpoint import checkpoint

from xpos_zoo.attention import NORM_EPS, MultiHeadAttention
from xpos_zoo.bias import DistanceBias, QueryScaling
from xpos_zoo.cache import KeyValueCache
from xpos_zoo.checks import as_integer, as_sizes
from xpos_zoo.generation import check_tokens, generate, stream
from xpos_zoo.plan import LayerPlan, plan_attention
from xpos_zoo.pretrained import KNOWN, TransformerConfig, from_named, read_folder, to_named, write_folder
from xpos_zoo.rotary import XPOS, PositionModule


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

    def __init__(self, attention: MultiHeadAttention, hidden_dim: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(attention.embed_dim, NORM_EPS)
        self.attention = attention
        self.feed_forward_norm = nn.RMSNorm(attention.embed_dim, NORM_EPS)
        self.feed_forward = FeedForward(attention.embed_dim, hidden_dim)

    def forward(self, x: Tensor, plan: LayerPlan) -> Tensor:
        p = self.attention.dropout
        x = x + dropout(self.attention.attend(self.attention_norm(x), plan), p, self.training)
        return x + dropout(self.feed_forward(self.feed_forward_norm(x)), p, self.training)


Positions = Callable[[int], PositionModule]


def each_layer(name: str, value: Any, num_layers: int) -> list[Any]:
    """The value of each layer: a list has one for each, anything else is every layer's."""
    if not isinstance(value, (list, tuple, nn.ModuleList)):
        return [value] * num_layers
    if len(value) != num_layers:
        raise ValueError(f"{name} must be one for all layers or a list of {num_layers}, got a list of {len(value)}")
    return list(value)


def one_or_list(values: list[Any]) -> Any:
    """The inverse of `each_layer`."""
    return values[0] if all(value == values[0] for value in values) else values


def of_all_layers(name: str, meaning: str) -> Any:
    """A property that gets a setting of all layers, a list where they differ, and sets it by `set_attention`."""
    return property(
        lambda model: one_or_list([getattr(attention, name) for attention in model.attentions]),
        lambda model, value: model.set_attention(**{name: value}),
        doc=f"{meaning}, of all layers; a list where they differ. May be set.",
    )


class Transformer(nn.Module):
    """Causal language model: tokens (b, n) give logits (b, n, vocab_size).

    RMSNorm before attention and before a SwiGLU feed-forward network, no biases, output weights tied to the embedding.

    Args:
        vocab_size, embed_dim, num_layers, num_heads: sizes.
        num_kv_heads, head_dim, qk_norm, output_gate: see `MultiHeadAttention`.
        positions, block_size, window_size, query_scaling, distance_bias: see there; for all layers, or a list with one
            for each (local layers, with a small window, and global ones). Layers share a bias that is one module.
        hidden_dim: width of the feed-forward network; by default 8/3 embed_dim, rounded up to a multiple of 32.
        dropout: probability of dropping an attention weight, and a feature before it joins the residual stream.
        tie_embeddings: whether the output projection is the embedding's transpose.
        device, dtype: see `MultiHeadAttention`.

    The attribute `checkpoint_activations`, False at first, has training keep a layer's input alone for the backward
    pass and compute the rest again: less memory for a third more work. ValueError as in `MultiHeadAttention`.
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
        positions: Positions | list[Positions] = XPOS,
        block_size: int | list[int | None] | None = None,
        window_size: int | list[int | None] | None = None,
        query_scaling: QueryScaling | list[QueryScaling | None] | None = None,
        distance_bias: DistanceBias | list[DistanceBias | None] | None = None,
        qk_norm: bool = False,
        output_gate: bool = False,
        hidden_dim: int | None = None,
        dropout: float = 0.0,
        tie_embeddings: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        vocab_size, embed_dim, num_layers = as_sizes(vocab_size=vocab_size, embed_dim=embed_dim, num_layers=num_layers)
        hidden_dim = -(-8 * embed_dim // (3 * 32)) * 32 if hidden_dim is None else as_integer("hidden_dim", hidden_dim)
        self.checkpoint_activations = False
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        options: dict[str, Any] = {"num_kv_heads": num_kv_heads, "head_dim": head_dim}
        options |= {"qk_norm": qk_norm, "output_gate": output_gate}
        self.layers = nn.ModuleList(
            DecoderLayer(MultiHeadAttention(embed_dim, num_heads, positions=own, **options), hidden_dim)
            for own in each_layer("positions", positions, num_layers)
        )
        self.norm = nn.RMSNorm(embed_dim, NORM_EPS)
        self.head = nn.Linear(embed_dim, vocab_size, bias=False)
        if tie_embeddings:
            self.head.weight = self.embedding.weight
        self.reset_parameters()
        self.set_attention(
            block_size=block_size,
            window_size=window_size,
            query_scaling=query_scaling,
            distance_bias=distance_bias,
            dropout=dropout,
        )
        self.to(device, dtype)

    def reset_parameters(self) -> None:
        """GPT-2's initialisation: normal, 0.02; what is added to the residual stream 1/sqrt(2 num_layers) of that."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            if name.endswith(("out_proj.weight", "down_proj.weight")):
                with torch.no_grad():
                    parameter /= (2 * len(self.layers)) ** 0.5

    def __setattr__(self, name: str, value: Any) -> None:
        # torch would register a module under the name of a property, which would stay as it was.
        if isinstance(value, nn.Module) and isinstance(getattr(type(self), name, None), property):
            self.set_attention(**{name: value})
        else:
            super().__setattr__(name, value)

    @property
    def attentions(self) -> list[MultiHeadAttention]:
        return [layer.attention for layer in self.layers]  # type: ignore[union-attr]

    def set_attention(self, **settings: Any) -> None:
        """Set in all layers what `MultiHeadAttention.set_attention` sets.

        A list has a value for each layer, anything else is every layer's. ValueError as for
        `MultiHeadAttention.set_attention`, or if a list has another length.
        """
        lists = {name: each_layer(name, value, len(self.layers)) for name, value in settings.items()}
        each = [{name: values[i] for name, values in lists.items()} for i in range(len(self.layers))]
        for attention, settings in zip(self.attentions, each, strict=True):  # nothing is set if one is refused
            attention.check_attention(**settings)
        for attention, settings in zip(self.attentions, each, strict=True):
            attention.set_attention(**settings)

    positions = of_all_layers("positions", "A `PositionModule`")
    block_size = of_all_layers("block_size", "None for dense attention, else the block size")
    window_size = of_all_layers("window_size", "None, or the size of the sliding window")
    query_scaling = of_all_layers("query_scaling", "None or a `QueryScaling`")
    distance_bias = of_all_layers("distance_bias", "None or a `DistanceBias`")
    dropout = of_all_layers("dropout", "The probability of dropping an attention weight, and a feature of the residual")
    cp_mesh = of_all_layers("cp_mesh", "None or a `DeviceMesh`: tokens and logits are then those of one rank")

    @property
    def config(self) -> TransformerConfig:
        """All but the weights, for `from_config`; ValueError if that is more than a configuration can say."""
        values: dict[str, Any] = {}
        for name in ("num_heads", "num_kv_heads", "head_dim", "qk_norm", "output_gate", "dropout"):
            values[name] = one_or_list([getattr(attention, name) for attention in self.attentions])
            if isinstance(values[name], list):
                raise ValueError(f"{name} must be the same in all layers to be saved, got {values[name]}")
        for kind in KNOWN:
            values[kind] = one_or_list([to_named(kind, getattr(attention, kind)) for attention in self.attentions])
        return TransformerConfig(
            vocab_size=self.embedding.num_embeddings,
            embed_dim=self.embedding.embedding_dim,
            num_layers=len(self.layers),
            hidden_dim=self.layers[0].feed_forward.gate_proj.out_features,  # type: ignore[union-attr]
            tie_embeddings=self.head.weight is self.embedding.weight,
            block_size=self.block_size,
            window_size=self.window_size,
            **values,
        )

    @classmethod
    def from_config(cls, config: TransformerConfig) -> Self:
        """A fresh model; ValueError or TypeError, as classes raise them, if a value or an argument is wrong."""
        return cls(**vars(config) | {kind: from_named(kind, getattr(config, kind)) for kind in KNOWN})

    def save_pretrained(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the model to the folder `path`: `config.json` and `model.safetensors`, which hold no code.

        Needs safetensors. Weights keep their dtype; tied ones are stored once. ValueError if a model is there and
        overwrite is False, or as for `config`, or safetensors is not installed.
        """
        config, weights = self.config, self.state_dict()
        for name in (name for name in weights if name.endswith(".positions.scale")):
            weights[name] = weights[name].clone()  # layers may share a module
        if config.tie_embeddings:
            del weights["head.weight"]
        write_folder(Path(path), config, weights, overwrite)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Self:
        """The model that `save_pretrained` wrote to the folder `path`, in evaluation mode and in its dtype.

        Needs safetensors. Nothing is ever imported because a file says so. ValueError if a file is missing, damaged or
        does not fit the other, or safetensors is not installed.
        """
        return read_folder(Path(path), cls.from_config, device)

    def make_cache(self, batch_size: int, max_length: int | None = None, **options: Any) -> KeyValueCache:
        """An empty cache for `forward`; arguments as for `KeyValueCache`."""
        return KeyValueCache(self.attentions, batch_size, max_length, **options)

    def forward(
        self,
        tokens: Tensor,
        cache: KeyValueCache | None = None,
        *,
        lengths: Tensor | None = None,
        document_ids: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Next-token logits (b, n, vocab_size) for tokens (b, n), int64 or int32.

        cache, lengths, document_ids, key_padding_mask and errors are those of `MultiHeadAttention.forward`; logits at
        padding mean nothing.
        """
        check_tokens(tokens)
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            x = self.embedding(tokens)
            logits = self.head(
                self.hidden_states(
                    x, cache, lengths=lengths, document_ids=document_ids, key_padding_mask=key_padding_mask
                )[-1]
            )
            if cache is not None:
                cache.advance()
        return logits

    def hidden_states(self, x: Tensor, cache: KeyValueCache | None = None, **others: Tensor | None) -> list[Tensor]:
        """What each layer is given, and what the head is, (b, n, embed_dim) each, for embedded tokens x; others as for
        `forward`. The cache is not advanced."""
        plans = plan_attention(self.attentions, x, cache, **others)
        states = []
        for layer, plan in zip(self.layers, plans, strict=True):
            states.append(x)
            if self.checkpoint_activations and cache is None and torch.is_grad_enabled():
                x = checkpoint(layer, x, plan, use_reentrant=False)
            else:
                x = layer(x, plan)
        return [*states, self.norm(x)]

    generate = generate
    stream = stream
