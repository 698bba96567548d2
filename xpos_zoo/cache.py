"""Keys and values of the tokens seen so far.

A layer's slots are cut into segments. A key is rotated by its position, scaled by its decay from the start of its own
segment, written once, and never changed. One query is scaled by its decay from the start of each segment
(`decode.py`); for many, keys are (`dense.py`). So no factor grows with the sequence.

Axes: b batch, g key-value heads, n new tokens, s slots, d head dimension.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from xpos_zoo.checks import as_integer, require_integers
from xpos_zoo.settings import BatchLayout

FIRST_SLOTS = 256  # of a cache that grows


def weight_of(projection: nn.Module) -> Tensor | None:
    """A projection's weight; None if it has none, or one of integers, as quantised ones may."""
    weight = getattr(projection, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.is_floating_point() else None


@dataclass(frozen=True)
class CacheLayout:
    """What a layer's cache and the attention that it is for have in common.

    At most `segment_length` keys share an origin: so many that no factor is above 2^8, or 2 in float16. It is a power
    of two, or a divisor of block_size. Local attention keeps `num_slots` keys: two blocks, or a window and the part of
    a segment that new keys have not overwritten yet; of dense attention it is 0.
    """

    num_kv_heads: int
    head_dim: int
    block_size: int | None
    window_size: int | None
    rates: tuple[complex, ...]
    interleaved: bool
    segment_length: int

    @classmethod
    def of(cls, attention: Any, dtype: torch.dtype) -> "CacheLayout":
        """That of an attention for a cache of `dtype`."""
        positions, w, window = attention.positions, attention.block_size, attention.window_size
        limit = max(1, positions.max_span(dtype) // 8)
        if w is not None:
            length = next(p for p in range(min(limit, w), 0, -1) if w % p == 0)
        else:
            most = limit if window is None else min(limit, max(1, window // 4))
            length = 2 ** (most.bit_length() - 1)
        heads, rates = (attention.num_kv_heads, attention.head_dim), (positions.rates, positions.interleaved)
        return cls(*heads, w, window, *rates, length)

    @property
    def num_slots(self) -> int:
        if self.window_size is not None:
            return -(-(self.window_size + self.segment_length - 1) // self.segment_length) * self.segment_length
        return 2 * (self.block_size or 0)


@dataclass(frozen=True, eq=False)
class WriteIndex:
    """Where in a layer's cache new keys and values go.

    Attributes:
        row, slot: of each row, the slots of its new tokens, (b, 1) and (b, n).
        token: which of the new tokens go there, (b, n); None for all.
        mask: whether they count, (b, n); None if all do.
    """

    row: Tensor
    slot: Tensor
    token: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def make(cls, layout: BatchLayout, num_slots: int) -> "WriteIndex":
        """For new tokens: of each row the last ones, where there are more than slots."""
        n, last, device = layout.n, min(layout.n, num_slots), layout.device
        row = torch.arange(layout.b, device=device)[:, None]
        if layout.counts is None:
            token = torch.arange(n - last, n, device=device)[None]
            return cls(row, (layout.first + token) % num_slots, None if last == n else token)
        token = layout.counts[:, None] - last + torch.arange(last, device=device)
        return cls(row, (layout.first + token) % num_slots, token.clamp(min=0), token >= 0)


class LayerCache(nn.Module):
    """Keys and values of one layer, k and v (b, g, s, d).

    Dense, it has a slot for each of `max_length` tokens. In local attention it is a ring buffer of a fixed size: the
    token at position t is in slot t % s, and overwrites one that no later query sees.
    """

    k: Tensor
    v: Tensor

    def __init__(self, layout: CacheLayout, k: Tensor, v: Tensor):
        super().__init__()
        self.layout = layout
        self.register_buffer("k", k)
        self.register_buffer("v", v)
        self.unwritten: tuple[WriteIndex, Tensor, Tensor] | None = None

    @classmethod
    def make(cls, attention: Any, batch_size: int, max_length: int, dtype: Any, device: Any) -> "LayerCache":
        weight = weight_of(attention.k_proj)
        if weight is None:
            weight = torch.empty(0, device=attention.positions.fixed_point_rates.device)
        device = torch.device(weight.device if device is None else device)
        if device.type == "meta":
            raise ValueError("device must be given, and not be meta, for a cache of weights on meta (offloaded)")
        if dtype is None:
            dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point one, got {dtype}")
        layout = CacheLayout.of(attention, dtype)
        shape = batch_size, layout.num_kv_heads, layout.num_slots, layout.head_dim
        # Zeros, for a hidden value times its weight 0 must be 0.
        cache = cls(layout, *(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))
        cache.grow(max_length)
        return cache

    def select(self, rows: Tensor) -> "LayerCache":
        """A new cache with copies of these rows."""
        return LayerCache(self.layout, self.k[rows], self.v[rows])

    @property
    def num_slots(self) -> int:
        return self.k.shape[2]

    @property
    def segment_length(self) -> int:
        """How many slots a segment has: all of a dense cache with fewer than its layout's."""
        return min(self.layout.segment_length, self.num_slots)

    def grow(self, max_length: int) -> None:
        """Give dense attention slots for max_length tokens."""
        if self.layout.num_slots == 0:
            # Old keys remain right: a segment that becomes longer was the only one, and starts at 0.
            length = min(self.layout.segment_length, max_length)
            more = -(-max_length // length) * length - self.num_slots
            self.k, self.v = (pad(t, (0, 0, 0, more)) for t in (self.k, self.v))

    def get_extra_state(self) -> dict[str, Any]:
        return asdict(self.layout)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Nothing: `prepare_to_load` has compared it."""

    def check(self, attention: Any, batch_size: int) -> None:
        """Raise ValueError unless the cache is for this attention and batch size."""
        needed, made = CacheLayout.of(attention, self.k.dtype), self.layout
        if (needed, batch_size) == (made, len(self.k)):
            return
        if needed.rates != made.rates:
            raise ValueError("cache does not match this layer: positions had other rates when it was made")
        values = [asdict(each) | {"batch_size": b} for each, b in ((needed, batch_size), (made, len(self.k)))]
        wrong = [name for name in values[0] if values[0][name] != values[1][name]]
        has, had = (", ".join(f"{name}={each[name]}" for name in wrong) for each in values)
        raise ValueError(f"cache does not match this layer: needs {has}, was made with {had}")

    def num_used(self, longest: int | None) -> int:
        """How many slots to look at if no row has more than `longest` tokens, in whole segments; all if unknown."""
        length = self.segment_length
        return self.num_slots if longest is None else min(self.num_slots, -(-max(longest, 1) // length) * length)

    def write(self, k: Tensor, v: Tensor, index: WriteIndex) -> None:
        """Have `commit` write new keys, rotated and scaled, and values (b, n, g, d)."""
        if index.token is not None:
            k, v = k[index.row, index.token], v[index.row, index.token]
        if index.mask is not None:
            mask = index.mask[..., None, None]
            k = torch.where(mask, k, self.k[index.row, :, index.slot])
            v = torch.where(mask, v, self.v[index.row, :, index.slot])
        self.unwritten = (index, k, v)

    def commit(self) -> None:
        """Write what `write` was given. Blocks do so after the forward: until then, its queries see what that
        overwrites, and after a failure the same tokens may come again."""
        if self.unwritten is not None:
            index, k, v = self.unwritten
            self.k[index.row, :, index.slot] = k
            self.v[index.row, :, index.slot] = v
            self.unwritten = None


class KeyValueCache(nn.Module):
    """What `make_cache` gives: a `LayerCache` for each layer. Each row of the batch counts its own tokens.

    It moves, saves and loads as a module does; float16 caches are laid out in a way of their own, and no other becomes
    one. A forward that raises leaves it as it was.

    Args:
        attentions: the attention of each layer.
        batch_size: rows.
        max_length: tokens per row that dense attention has room for; None for as many as come: a full cache then
            becomes twice as large, though not in a compiled graph. Local attention needs none.
        dtype, device: by default those of the weights; under autocast its dtype, for quantised weights torch's default.

    `length` counts the tokens seen, (b,), int64. ValueError if a size is not positive.
    """

    length: Tensor

    def __init__(
        self,
        attentions: Sequence[Any],
        batch_size: int,
        max_length: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ):
        super().__init__()
        batch_size = as_integer("batch_size", batch_size, 0, "0 or above and an integer")
        if max_length is not None:
            max_length = as_integer("max_length", max_length)
        self.grows, max_length = max_length is None, max_length or FIRST_SLOTS
        with torch.inference_mode(False):  # else nothing could be written to it outside
            layers = [LayerCache.make(attention, batch_size, max_length, dtype, device) for attention in attentions]
            device = layers[0].k.device if layers else device
            self.register_buffer("length", torch.zeros(batch_size, dtype=torch.int64, device=device))
        self.layers = nn.ModuleList(layers)
        self._max_length = max_length if any(layer.layout.num_slots == 0 for layer in layers) else None
        self.num_new_tokens: Tensor | int = 0
        self.register_load_state_dict_pre_hook(prepare_to_load)

    @property
    def max_length(self) -> int | None:
        """Tokens per row that there is room for; None for any number."""
        return self._max_length

    def grow(self, max_length: int) -> None:
        self._max_length = max_length
        with torch.inference_mode(False):
            for layer in self:
                layer.grow(max_length)

    def __getitem__(self, i: int) -> LayerCache:
        return self.layers[i]  # type: ignore[return-value]

    def __iter__(self) -> Iterator[LayerCache]:
        return iter(self.layers)  # type: ignore[arg-type]

    def reset(self) -> None:
        """Forget all tokens, and clear the slots: NaN in one would spoil even what hides it."""
        for buffer in self.buffers():
            buffer.zero_()

    def select(self, rows: Tensor) -> "KeyValueCache":
        """A new cache with copies of these rows, in this order: to fork, reorder or drop rows (beam search).

        `rows` are indices, (new batch size,), integers, some perhaps several times; ValueError for anything else.
        """
        if rows.ndim != 1 or rows.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"rows must be integers (new batch size,), got {rows.dtype} {tuple(rows.shape)}")
        selected = KeyValueCache([], len(rows))
        with torch.inference_mode(False):
            selected.layers = nn.ModuleList(layer.select(rows) for layer in self)
            selected.length = self.length[rows]
        selected._max_length, selected.grows = self.max_length, self.grows
        return selected

    def crop(self, lengths: int | Tensor) -> None:
        """Keep at most so many tokens of each row, the first ones: an integer, or one for each row, (b,).

        ValueError if a layer is local, whose later tokens have overwritten what it would go back to.
        """
        if any(layer.layout.num_slots for layer in self):
            raise ValueError("block_size and window_size must be None to crop a cache: new keys overwrite old ones")
        if isinstance(lengths, Tensor):
            require_integers("lengths", lengths, self.length.shape)
        if not isinstance(lengths, Tensor) or (lengths < 0).any():
            as_integer("lengths", lengths, 0, "0 or above and integers")
        self.length.clamp_(max=lengths)

    def reserve(self, n: int, lengths: Tensor | None) -> int | None:
        """Make room for n more tokens per row, of which `lengths` (b,) count: the most tokens that a row then has; None
        in a graph.

        Looks at numbers on the device once, and only if a limit needs it. ValueError if lengths are not between 0 and
        n, or the tokens do not fit; in a graph a RuntimeError.
        """
        for layer in self:
            layer.unwritten = None  # of a forward that failed
        if lengths is not None:
            require_integers("lengths", lengths, self.length.shape)
        self.num_new_tokens = n if lengths is None else lengths
        total = self.length + self.num_new_tokens
        if torch.compiler.is_compiling():
            # Private: no public assertion becomes a part of the graph.
            if lengths is not None:
                torch._assert_async(((lengths >= 0) & (lengths <= n)).all(), "lengths must be between 0 and seq_len")  # pyright: ignore[reportPrivateImportUsage]
            if self.max_length is not None:
                torch._assert_async((total <= self.max_length).all(), "cache is full: see its max_length")  # pyright: ignore[reportPrivateImportUsage]
            return None
        if self.length.numel() == 0 or (lengths is None and self.max_length is None):
            return None
        counts = total - self.length
        longest, fewest, most = torch.stack((total.max(), counts.min(), counts.max())).tolist()
        if fewest < 0 or most > n:
            raise ValueError(f"lengths must be between 0 and seq_len={n}, got {counts.tolist()}")
        if self.max_length is not None and longest > self.max_length and self.grows:
            self.grow(max(longest, 2 * self.max_length))
        elif self.max_length is not None and longest > self.max_length:
            raise ValueError(
                f"cache must have room for {n} more tokens, got max_length={self.max_length}, of which "
                f"{int(self.length.max())} are taken"
            )
        return longest

    def advance(self) -> None:
        """Count the tokens that were reserved, of a forward that is done."""
        for layer in self:
            layer.commit()
        self.length += self.num_new_tokens
        self.num_new_tokens = 0


def prepare_to_load(cache: KeyValueCache, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a state dict is loaded: ValueError if it does not fit, and nothing is loaded. A cache that grows gets as
    many slots as the state dict has."""
    names = "k", "v", "_extra_state"
    saved: list[dict[str, Any]] = [
        {name: state_dict.get(f"{prefix}layers.{i}.{name}") for name in names} for i in range(len(cache.layers))
    ]
    for layer, own in zip(cache, saved, strict=True):
        if own["_extra_state"] not in (None, layer.get_extra_state()):
            raise ValueError(
                f"state_dict does not match this cache: has {own['_extra_state']}, needs {layer.get_extra_state()}"
            )
    dense = [own["k"] for layer, own in zip(cache, saved, strict=True) if layer.layout.num_slots == 0]
    slots = [k.shape[2] for k in dense if k is not None]
    if cache.grows and slots and min(slots) > (cache.max_length or 0):
        cache.grow(min(slots))  # others round it up, as they did
    for i, (layer, own) in enumerate(zip(cache, saved, strict=True)):
        for name, held in (("k", layer.k), ("v", layer.v)):
            if own[name] is not None and own[name].shape != held.shape:
                raise ValueError(
                    f"state_dict must hold {name} {tuple(held.shape)} in layer {i}, got {tuple(own[name].shape)}"
                )
