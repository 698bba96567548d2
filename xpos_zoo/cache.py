"""Keys and values of the tokens seen so far.

A layer's slots are cut into parts. A key is rotated and scaled relative to the start of its own part, written once, and
never changed. To be attended to, either the query comes in one version for each part (one token: decode), or the keys
of each part are rotated by where it starts (many tokens: prefill). So no factor grows with the sequence.

Axes: b batch, g key-value heads, n new tokens, s slots, d head dimension.
"""

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from xpos_zoo.checks import as_integer, require_integers
from xpos_zoo.rotary import PositionModule

FIRST_ROOM = 256  # tokens, of a cache that grows


def part_size(positions: PositionModule, block_size: int | None = None, most: int = sys.maxsize) -> int:
    """How many keys share an origin: so many that no factor is above 2, for any cache may become float16.

    A divisor of block_size, or a power of two that is at most `most`.
    """
    limit = max(1, positions.max_span(torch.float16) // 8)
    if block_size is None:
        return min(2 ** (limit.bit_length() - 1), most)
    return next(p for p in range(min(limit, block_size), 0, -1) if block_size % p == 0)


def layout(attention: Any, most: int) -> dict[str, int | None]:
    """What a cache for `most` tokens has in common with the attention that it is for."""
    own = {name: getattr(attention, name) for name in ("num_kv_heads", "head_dim", "block_size")}
    return own | {"part_size": part_size(attention.positions, attention.block_size, most)}


def weight_of(projection: nn.Module) -> Tensor | None:
    """A projection's weight; None if it has none, or one of integers, as quantised ones may."""
    weight = getattr(projection, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.is_floating_point() else None


@dataclass(frozen=True, eq=False)
class Slots:
    """Where in a layer's cache new keys and values go, and where blocks find theirs.

    Attributes:
        row, slot: of each row, the slots of its new tokens, (b, n).
        table: rotates new keys relative to the starts of their parts; None if nothing is rotated.
        token: which of the new tokens go there, (b, n); None for all.
        kept: whether they count, (b, n); None if all do.
        places: which slot or, counted on from the slots, which new token stands at each place of the blocks.
        asked: the places of the new tokens, (b, n).
        restore: the table that takes back the rotation of the keys in all slots.
    """

    row: Tensor
    slot: Tensor
    table: Tensor | None
    token: Tensor | None = None
    kept: Tensor | None = None
    places: Tensor | None = None
    asked: Tensor | None = None
    restore: Tensor | None = None


class LayerCache(nn.Module):
    """Keys and values of one layer, k and v (b, g, s, d).

    Dense, it has a slot for each of `max_length` tokens. Blockwise, it has two blocks of slots: the token at position t
    is in slot t % slots, and overwrites one that no later query sees.
    """

    k: Tensor
    v: Tensor

    def __init__(
        self,
        attention: Any,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype | None,
        device: torch.device | None,
    ):
        super().__init__()
        weight = weight_of(attention.k_proj)
        if weight is None:
            weight = torch.empty(0, device=attention.positions.increments.device)
        device = torch.device(weight.device if device is None else device)
        if dtype is None:
            dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype
        assert dtype is not None
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point one, got {dtype}")
        self.layout, self.most_in_part = layout(attention, max_length), part_size(attention.positions)
        self.block_size: int | None = attention.block_size
        shape = batch_size, attention.num_kv_heads, 2 * (self.block_size or 0), attention.head_dim
        for name in ("k", "v"):  # zeros, for a hidden value times its weight 0 must be 0
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))
        self.grow(max_length)
        self.pending: tuple[Slots, Tensor, Tensor] | None = None

    @property
    def part_size(self) -> int:
        return self.layout["part_size"]  # type: ignore[return-value]

    @property
    def slots(self) -> int:
        return self.k.shape[2]

    def grow(self, max_length: int) -> None:
        """Give dense attention slots for max_length tokens. Old keys stay: parts were as large, or there was one."""
        if self.block_size is None:
            self.layout = self.layout | {"part_size": min(self.most_in_part, max_length)}
            more = -(-max_length // self.part_size) * self.part_size - self.slots
            self.k, self.v = (pad(t, (0, 0, 0, more)) for t in (self.k, self.v))

    def get_extra_state(self) -> dict[str, Any]:
        return self.layout

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if state != self.layout:
            raise ValueError(f"state_dict must be of a cache with {self.layout}, got {state}")

    def check(self, attention: Any, batch_size: int) -> None:
        """Raise ValueError unless the cache is for this attention and batch size."""
        expected = {"batch_size": batch_size} | layout(attention, self.slots)
        found = {"batch_size": len(self.k)} | self.layout
        if found != expected:
            raise ValueError(f"cache must be made for {expected}, got one for {found}")

    def used(self, most: int | None) -> int:
        """How many slots to look at if no row has more than `most` tokens, in whole parts; all if that is not known."""
        return self.slots if most is None else min(self.slots, -(-max(most, 1) // self.part_size) * self.part_size)

    def write(self, k: Tensor, v: Tensor, slots: Slots) -> None:
        """Have `commit` write new keys, rotated within their parts, and values (b, n, g, d).

        Blocks commit after the forward: one that failed and is repeated still sees what they overwrite.
        """
        if slots.token is not None:
            k, v = k[slots.row, slots.token], v[slots.row, slots.token]
        if slots.kept is not None:
            kept = slots.kept[..., None, None]
            k = torch.where(kept, k, self.k[slots.row, :, slots.slot])
            v = torch.where(kept, v, self.v[slots.row, :, slots.slot])
        self.pending = (slots, k, v)

    def commit(self) -> None:
        if self.pending is not None:
            slots, k, v = self.pending
            self.k[slots.row, :, slots.slot] = k
            self.v[slots.row, :, slots.slot] = v
            self.pending = None


class KeyValueCache(nn.Module):
    """What `make_cache` gives: a `LayerCache` for each layer. Each row of the batch counts its own tokens.

    It moves, saves and loads as a module does. A forward that raises leaves it as it was.

    Args:
        attentions: the attention of each layer.
        batch_size: rows.
        max_length: tokens a row that dense attention has room for; None for as many as come: a full cache becomes twice
            as large, though not in a compiled graph. Blockwise attention needs none: it keeps two blocks.
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
        self.grows, max_length = max_length is None, max_length or FIRST_ROOM
        layers = [LayerCache(attention, batch_size, max_length, dtype, device) for attention in attentions]
        self.layers = nn.ModuleList(layers)
        self.max_length = max_length if any(layer.block_size is None for layer in layers) else None
        self.coming: Tensor | int = 0
        self.register_buffer("length", torch.zeros(batch_size, dtype=torch.int64, device=layers[0].k.device))

    def __getitem__(self, i: int) -> LayerCache:
        return self.layers[i]  # type: ignore[return-value]

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
        # As a deep copy, but of each buffer those rows.
        return copy.deepcopy(self, {id(buffer): buffer[rows] for buffer in self.buffers()})

    def crop(self, lengths: int | Tensor) -> None:
        """Keep at most so many tokens of each row, the first ones: an integer, or one for each row, (b,).

        ValueError if a layer is blockwise, whose later tokens have overwritten what it would go back to.
        """
        if any(layer.block_size is not None for layer in self.layers):
            raise ValueError("block_size must be None to crop a cache: blocks overwrite those before them")
        if isinstance(lengths, Tensor):
            require_integers("lengths", lengths, self.length.shape)
        if not isinstance(lengths, Tensor) or (lengths < 0).any():
            as_integer("lengths", lengths, 0, "0 or above and integers")
        self.length.clamp_(max=lengths)

    def admit(self, n: int, lengths: Tensor | None) -> int | None:
        """The most tokens that a row has with n more, of which `lengths` (b,) count; None in a graph.

        Looks at numbers on the device once, and only if a limit needs it. ValueError if lengths are not between 0 and
        n, or the tokens do not fit; in a graph a RuntimeError.
        """
        for layer in self.layers:
            layer.pending = None  # type: ignore[assignment]  # of a forward that failed
        if lengths is not None:
            require_integers("lengths", lengths, self.length.shape)
        self.coming = n if lengths is None else lengths
        total = self.length + self.coming
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
        most, shortest, longest = torch.stack((total.max(), counts.min(), counts.max())).tolist()
        if shortest < 0 or longest > n:
            raise ValueError(f"lengths must be between 0 and seq_len={n}, got {counts.tolist()}")
        if self.max_length is not None and most > self.max_length and self.grows:
            self.max_length = max(most, 2 * self.max_length)
            for layer in self.layers:
                layer.grow(self.max_length)  # type: ignore[operator]
        elif self.max_length is not None and most > self.max_length:
            raise ValueError(
                f"cache must have room for {n} more tokens, got max_length={self.max_length}, of which "
                f"{int(self.length.max())} are taken"
            )
        return most

    def advance(self) -> None:
        """Count the tokens that were admitted, of a forward that is done."""
        for layer in self.layers:
            layer.commit()  # type: ignore[operator]
        self.length += self.coming
        self.coming = 0
