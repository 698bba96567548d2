"""A small pre-norm decoder language model of `MultiHeadAttention` blocks.

Axes: b batch, n sequence.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu
from torch.utils.checkpoint import checkpoint

from xpos_zoo.attention import NORM_EPS, MultiHeadAttention, plan_layers
from xpos_zoo.bias import DistanceBias, QueryScaling
from xpos_zoo.cache import KeyValueCache, LayerCache
from xpos_zoo.checks import require_integers, require_sizes
from xpos_zoo.plan import Plan
from xpos_zoo.pretrained import KNOWN, TransformerConfig, from_named, read_folder, to_named, write_folder
from xpos_zoo.rotary import PositionModule
from xpos_zoo.sampling import check_sampling, sample
from xpos_zoo.xpos import XPOS


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

    def forward(self, x: Tensor, plan: Plan | None = None, cache: LayerCache | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cache, plan=plan))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


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


def setting(name: str, what: str) -> Any:
    """A property of `Transformer` that is the attribute of that name of each layer's attention."""

    def read(self: "Transformer") -> Any:
        return one_or_list([getattr(attention, name) for attention in self.attentions])

    def write(self: "Transformer", value: Any) -> None:
        for attention, own in zip(self.attentions, each_layer(name, value, len(self.layers)), strict=True):
            setattr(attention, name, own)

    return property(read, write, doc=f"{what}, of all layers, or a list with one for each where they differ.")


class Transformer(nn.Module):
    """Causal language model: tokens (b, n) give logits (b, n, vocab_size).

    RMSNorm before attention and before a SwiGLU feed-forward network, no biases, output weights tied to the embedding.

    Args:
        vocab_size, embed_dim, num_layers, num_heads: sizes.
        num_kv_heads, head_dim, qk_norm: see `MultiHeadAttention`.
        positions, block_size, query_scaling, distance_bias: see there; for all layers, or a list with one for each
            (local layers, with a small block, and global ones). Layers share a bias that is one module.
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
        query_scaling: QueryScaling | list[QueryScaling | None] | None = None,
        distance_bias: DistanceBias | list[DistanceBias | None] | None = None,
        qk_norm: bool = False,
        hidden_dim: int | None = None,
        dropout: float = 0.0,
        tie_embeddings: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        require_sizes(vocab_size=vocab_size, embed_dim=embed_dim, num_layers=num_layers)
        hidden_dim = -(-8 * embed_dim // (3 * 32)) * 32 if hidden_dim is None else hidden_dim
        require_sizes(hidden_dim=hidden_dim)
        self.checkpoint_activations = False
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        options: dict[str, Any] = {"num_kv_heads": num_kv_heads, "head_dim": head_dim}
        options |= {"qk_norm": qk_norm, "dropout": dropout}
        self.layers = nn.ModuleList(
            DecoderLayer(MultiHeadAttention(embed_dim, num_heads, positions=own, **options), hidden_dim, dropout)
            for own in each_layer("positions", positions, num_layers)
        )
        self.norm = nn.RMSNorm(embed_dim, NORM_EPS)
        self.head = nn.Linear(embed_dim, vocab_size, bias=False)
        if tie_embeddings:
            self.head.weight = self.embedding.weight
        self.reset_parameters()
        self.block_size, self.query_scaling, self.distance_bias = block_size, query_scaling, distance_bias  # as given
        self.to(device, dtype)

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
        return [layer.attention for layer in self.layers]  # type: ignore[union-attr]

    block_size = setting("block_size", "None for dense attention, else the block size of blockwise attention")
    query_scaling = setting("query_scaling", "None, or a `QueryScaling` such as `LogNScaling`")
    distance_bias = setting("distance_bias", "None, or a `DistanceBias` such as `SoftTail`")
    cp_mesh = setting("cp_mesh", "None, or the `DeviceMesh` of context parallelism: tokens and logits are of one rank")

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)  # a bias that is a module belongs to the layers, not to the model
        else:
            super().__setattr__(name, value)

    @property
    def config(self) -> TransformerConfig:
        """All but the weights, for `from_config`; ValueError if that is more than a configuration can say."""
        values: dict[str, Any] = {}
        for name in ("num_heads", "num_kv_heads", "head_dim", "qk_norm", "dropout"):
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
            logits = self.head(self._features(self.embedding(tokens), cache, lengths, document_ids, key_padding_mask))
            if cache is not None:
                cache.advance()
        return logits

    def _features(
        self, x: Tensor, cache: KeyValueCache | None, *others: Tensor | None, states: list[Tensor] | None = None
    ) -> Tensor:
        """What the head is given, (b, n, embed_dim), for embedded tokens x (b, n, embed_dim); others as `forward`.

        What each layer is given is appended to `states`.
        """
        plans = plan_layers(self.attentions, x, cache, *others)
        for i, (layer, plan) in enumerate(zip(self.layers, plans, strict=True)):
            if states is not None:
                states.append(x)
            if self.checkpoint_activations and cache is None and torch.is_grad_enabled():
                x = checkpoint(layer, x, plan, use_reentrant=False)
            else:
                x = layer(x, plan, None if cache is None else cache[i])
        return self.norm(x)

    def generate(self, tokens: Tensor, max_new_tokens: int, *, lengths: Tensor | None = None, **options: Any) -> Tensor:
        """Continue each row of tokens (b, n): (b, n + up to max_new_tokens).

        Each row's new tokens follow its own end; with `lengths`, what remains on the right is still padding. All
        arguments are those of `stream`.
        """
        stream = self.stream(tokens, max_new_tokens, lengths=lengths, **options)
        ends = tokens.shape[1] if lengths is None else lengths.long()
        rows = torch.arange(len(tokens), device=tokens.device)
        for count, new in enumerate(stream):
            tokens = pad(tokens, (0, 1))
            tokens[rows, ends + count] = new
        return tokens

    def stream(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        lengths: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos: int | None = None,
        seed: int | None = None,
        decode: Callable[..., Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """Continue each row of tokens (b, n): an iterator over (b,), the rows' next tokens.

        Works at any length from a cache; with `block_size` set, in constant memory and time a token. Call `eval()`
        first if the model has dropout.

        Args:
            tokens: the prompts, at least one token each.
            max_new_tokens: when to stop.
            lengths: tokens of each prompt, (b,), if the prompts are padded on the right; each goes on as if alone.
            temperature, top_k, top_p: how to draw; see `xpos_zoo.sampling.sample`. Temperature 0 is greedy.
            eos: token that ends a row, which then repeats it; when all rows have ended, so does the iterator.
            seed: of the random numbers; by default torch's own go on.
            decode: what to call for a step instead of this model, such as `torch.compile(model, fullgraph=True)`.

        ValueError, at once, if an argument is out of range or has another shape.
        """
        check_tokens(tokens)
        n = tokens.shape[1]
        if n == 0:
            raise ValueError(f"tokens must have at least one token a row, got {tuple(tokens.shape)}")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be 0 or above, got {max_new_tokens}")
        if lengths is not None:
            require_integers("lengths", lengths, tokens.shape[:1])
            if not ((lengths > 0) & (lengths <= n)).all():
                raise ValueError(f"lengths must be from 1 to seq_len={n}, got {lengths.tolist()}")
        check_sampling(temperature, top_k, top_p)
        generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)

        @torch.no_grad()
        def steps() -> Iterator[Tensor]:  # apart, so that errors are raised before the first step
            cache = self.make_cache(len(tokens), n + max_new_tokens)
            features = self._features(self.embedding(tokens), cache, lengths)
            cache.advance()
            rows = torch.arange(len(tokens), device=tokens.device)
            logits = self.head(features[rows, -1 if lengths is None else lengths - 1])
            ended = torch.zeros_like(rows, dtype=torch.bool)
            for left in reversed(range(max_new_tokens)):
                new = sample(logits, temperature, top_k, top_p, generator).to(tokens.dtype)
                if eos is not None:
                    new = new.masked_fill(ended, eos)
                    ended |= new == eos
                yield new
                if left == 0 or (eos is not None and ended.all()):
                    return
                logits = (self if decode is None else decode)(new[:, None], cache)[:, -1]

        return steps() if max_new_tokens else iter(())


def check_tokens(tokens: Tensor) -> None:
    if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"tokens must be int64 or int32 (batch, seq_len), got {tokens.dtype} {tuple(tokens.shape)}")
