"""Keys and values of the tokens seen so far.

A layer's slots are cut into parts. A key is rotated and scaled relative to the start of its own part, written once, and
right for ever. To look at it, either the query comes in one version a part (one token: decode), or each part's keys are
rotated on by where their part starts (many tokens: prefill). No factor grows with the sequence either way.

Axes: b batch, g key-value heads, n new tokens, s slots, d head dimension.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xpos_zoo.checks import as_integer, require_integers, require_sizes
from xpos_zoo.rotary import PositionModule


def part_size(positions: PositionModule, multiple: int | None = None) -> int:
    """How many keys share an origin: so many that none of their factors is above 2.

    So even keys in float16, which any cache may become, keep their size. A divisor of `multiple`, or a power of two.
    """
    limit = max(1, positions.max_span(torch.float16) // 8)
    if multiple is not None:
        return next(p for p in range(min(limit, multiple), 0, -1) if multiple % p == 0)
    return 2 ** (limit.bit_length() - 1)


@dataclass(frozen=True, eq=False)
class Writing:
    """Where the new keys and values go in a cache: token (b, n) of each row, all if None, to slot (b, n) where kept."""

    row: Tensor
    slot: Tensor
    token: Tensor | None
    kept: Tensor | None


class LayerCache(nn.Module):
    """Keys and values of one layer, k and v (b, g, s, d).

    Dense, it has a slot for each of `max_length` tokens. Blockwise, it has two blocks of slots: the token at position t
    is in slot t % slots, and what it overwrites is out of every later query's sight.
    """

    k: Tensor
    v: Tensor

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        positions: PositionModule,
        *,
        max_length: int | None = None,
        block_size: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ):
        super().__init__()
        as_integer("batch_size", batch_size)
        if max_length is None and block_size is None:
            raise ValueError("max_length must be given for dense attention, whose cache grows with every token")
        if max_length is not None:
            require_sizes(max_length=max_length)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point one, got {dtype}")
        if block_size is not None:
            self.part_size, self.slots = part_size(positions, block_size), 2 * block_size
        else:
            assert max_length is not None
            self.part_size = min(part_size(positions), max_length)
            self.slots = -(-max_length // self.part_size) * self.part_size
        self.block_size = block_size
        # Zeros, for a hidden value times its weight 0 must be 0.
        for name in ("k", "v"):
            zeros = torch.zeros(batch_size, num_kv_heads, self.slots, head_dim, dtype=dtype, device=device)
            self.register_buffer(name, zeros)
        self._later: tuple[Writing, Tensor, Tensor] | None = None

    def extra_repr(self) -> str:
        return f"k={tuple(self.k.shape)} {self.k.dtype}, block_size={self.block_size}"

    def get_extra_state(self) -> dict[str, Any]:
        return {"part_size": self.part_size, "block_size": self.block_size}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if state != self.get_extra_state():
            raise ValueError(f"state_dict must be of a cache with {self.get_extra_state()}, got {state}")

    def used(self, most: int | None) -> int:
        """How many slots to look at if no row has more than `most` tokens, in whole parts; all if that is not known."""
        return self.slots if most is None else min(self.slots, -(-max(most, 1) // self.part_size) * self.part_size)

    def write(self, k: Tensor, v: Tensor, writing: Writing, later: bool = False) -> None:
        """Write new keys, rotated within their parts, and values (b, n, g, d); `later` means when `commit` is called.

        What blocks overwrite is in sight until then, for whoever repeats a forward that failed. What dense attention
        writes is beyond `length`, and in nobody's sight.
        """
        if writing.token is not None:
            k, v = k[writing.row, writing.token], v[writing.row, writing.token]
        if writing.kept is not None:
            kept = writing.kept[..., None, None]
            k = torch.where(kept, k, self.k[writing.row, :, writing.slot])
            v = torch.where(kept, v, self.v[writing.row, :, writing.slot])
        self._later = (writing, k, v)
        if not later:
            self.commit()

    def commit(self) -> None:
        """Write what was kept for later."""
        if self._later is not None:
            writing, k, v = self._later
            self.k[writing.row, :, writing.slot] = k
            self.v[writing.row, :, writing.slot] = v
            self._later = None

    def drop(self) -> None:
        """Forget what was kept for later."""
        self._later = None


class KeyValueCache(nn.Module):
    """What `make_cache` gives: a `LayerCache` for each layer. Each row of the batch counts its own tokens.

    It is a module so that it moves, saves and loads like one: `to(device)`, `state_dict`, `load_state_dict`. A forward
    that raises leaves it as it was.

    Attributes:
        layers: the layers' keys and values.
        length: tokens seen, (b,), int64.
        max_length: tokens that fit; None if there is no limit.
    """

    length: Tensor

    def __init__(self, layers: Iterable[LayerCache], max_length: int | None = None):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        dense = any(layer.block_size is None for layer in self.layers)
        self.max_length = max_length if dense else None
        k = self[0].k
        self.register_buffer("length", torch.zeros(len(k), dtype=torch.int64, device=k.device))

    def __getitem__(self, i: int) -> LayerCache:
        return self.layers[i]  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"max_length={self.max_length}"

    def reset(self) -> None:
        """Forget all tokens, and whatever they left: what is not a number would spoil even what hides it."""
        for buffer in self.buffers():
            buffer.zero_()

    def select(self, rows: Tensor) -> "KeyValueCache":
        """A new cache with copies of these rows, in this order: to fork, reorder or drop rows (beam search).

        Args:
            rows: indices of rows, (new batch size,), integers; a row may come several times.

        Raises:
            ValueError: rows has another shape or dtype.
        """
        if rows.ndim != 1 or rows.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"rows must be integers (new batch size,), got {rows.dtype} {tuple(rows.shape)}")
        # As a deep copy, but of each buffer those rows.
        return copy.deepcopy(self, {id(buffer): buffer[rows] for buffer in self.buffers()})

    def admit(self, n: int, lengths: Tensor | None) -> int | None:
        """The most tokens that a row has with n more, of which `lengths` (b,) count; None in a graph.

        Looks at numbers on the device once, and only if a limit needs it.

        Raises:
            ValueError: lengths are not between 0 and n, or the tokens do not fit; in a graph a RuntimeError.
        """
        for layer in self.layers:
            layer.drop()  # type: ignore[operator]  # of a forward that failed
        if lengths is not None:
            require_integers("lengths", lengths, self.length.shape)
        total = self.length + (n if lengths is None else lengths)
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
        if self.max_length is not None and most > self.max_length:
            raise ValueError(
                f"cache must have room for {n} more tokens, got max_length={self.max_length}, of which "
                f"{int(self.length.max())} are taken"
            )
        return most

    def advance(self, n: int, lengths: Tensor | None) -> None:
        """Count the tokens of a forward that is done."""
        for layer in self.layers:
            layer.commit()  # type: ignore[operator]
        self.length += n if lengths is None else lengths
