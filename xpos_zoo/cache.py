"""Keys and values of the tokens seen so far, and attention to them: the same numbers as a full forward.

A cache is cut into parts. A key is rotated and scaled relative to the start of its own part, written once, and right
for ever. To look at it, either the query comes in one version a part (one token: decode), or each part's keys are
rotated by where their part starts (many tokens: prefill). No factor grows with the sequence either way.

Axes: b batch, h heads, g key-value heads, r = h/g, n new tokens, s slots, j parts of p slots, w tokens in a block,
d head dimension.
"""

from copy import copy
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from xpos_zoo.blockwise import attend_blocks, fold, windows
from xpos_zoo.checks import require_sizes
from xpos_zoo.dense import PositionModule, attend_windows, distance_bias_of
from xpos_zoo.rotary import at_least_float32

PART = 256  # slots: few enough for any factor, enough that the query's versions cost little beside the keys


class KeyValueCache(nn.Module):
    """What `MultiHeadAttention.make_cache` gives. Each row of the batch counts its own tokens.

    Dense, it has a slot for each of `max_length` tokens. Blockwise, it has two blocks of slots: the token at position t
    is in slot t % slots, and what it overwrites is out of every later query's sight.

    It is a module so that it moves, saves and loads like one: `to(device)`, `state_dict`, `load_state_dict`.

    Attributes:
        k, v: (b, g, slots, d).
        length: tokens seen, (b,), int64.
        max_length: tokens that fit; None if there is no limit.
        block_size: of blockwise attention, None for dense.
        part_size: slots in a part.
    """

    k: Tensor
    v: Tensor
    length: Tensor

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
        if not isinstance(batch_size, int) or batch_size < 0:
            raise ValueError(f"batch_size must be 0 or above and an integer, got {batch_size}")
        if max_length is None and block_size is None:
            raise ValueError("max_length must be given for dense attention, whose cache grows with every token")
        if max_length is not None:
            require_sizes(max_length=max_length)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point one, got {dtype}")
        # As keys in float16 need it, which the cache may become.
        limit = max(1, positions.max_span(torch.float16) // 2)
        if block_size is None:
            assert max_length is not None
            self.part_size = min(limit, PART, max_length)
            self.slots = -(-max_length // self.part_size) * self.part_size
        else:
            limit = min(limit, block_size)
            self.part_size = next(p for p in range(limit, 0, -1) if block_size % p == 0)
            self.slots = 2 * block_size
        self.max_length = max_length if block_size is None else None
        self.block_size = block_size
        # Zeros, for a hidden value times its weight 0 must be 0.
        for name in ("k", "v"):
            zeros = torch.zeros(batch_size, num_kv_heads, self.slots, head_dim, dtype=dtype, device=device)
            self.register_buffer(name, zeros)
        self.register_buffer("length", torch.zeros(batch_size, dtype=torch.int64, device=device))

    def extra_repr(self) -> str:
        return f"k={tuple(self.k.shape)} {self.k.dtype}, max_length={self.max_length}, block_size={self.block_size}"

    def get_extra_state(self) -> dict[str, Any]:
        return {"part_size": self.part_size, "block_size": self.block_size}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if state != self.get_extra_state():
            raise ValueError(f"state_dict must be of a cache with {self.get_extra_state()}, got {state}")

    def reset(self) -> None:
        """Forget all tokens."""
        self.length.zero_()

    def select(self, rows: Tensor) -> "KeyValueCache":
        """A new cache with copies of these rows, in this order: to fork, reorder or drop rows (beam search).

        Args:
            rows: indices of rows, (new batch size,), integers; a row may come several times.

        Raises:
            ValueError: rows has another shape or dtype.
        """
        if rows.ndim != 1 or rows.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"rows must be integers (new batch size,), got {rows.dtype} {tuple(rows.shape)}")
        other = copy(self)
        other._buffers = {name: buffer[rows] for name, buffer in self.named_buffers()}
        return other

    def check_room(self, n: int, lengths: Tensor | None) -> None:
        """Raise a ValueError if n more tokens, of which `lengths` (b,) count, do not fit; in a graph a RuntimeError."""
        count = torch.full_like(self.length, n) if lengths is None else lengths
        if torch.compiler.is_compiling():
            torch._assert_async(((count >= 0) & (count <= n)).all(), "lengths must be between 0 and seq_len")  # pyright: ignore[reportPrivateImportUsage]
            if self.max_length is not None:
                torch._assert_async((self.length + count <= self.max_length).all(), "cache is full: see its max_length")  # pyright: ignore[reportPrivateImportUsage]
            return
        if lengths is not None and not ((count >= 0) & (count <= n)).all():
            raise ValueError(f"lengths must be between 0 and seq_len={n}, got {lengths.tolist()}")
        if self.max_length is not None and (self.length + count > self.max_length).any():
            raise ValueError(
                f"cache must have room for {n} more tokens, got max_length={self.max_length}, of which "
                f"{int(self.length.max())} are taken"
            )

    def token_positions(self, length: Tensor, slots: Tensor) -> Tensor:
        """The position of the newest token in each slot when there are `length` (b,): (b, slots), negative for none."""
        newest = length[:, None] - 1
        return newest - (newest - slots) % self.slots

    def append(self, k: Tensor, v: Tensor, count: Tensor) -> None:
        """Write the first `count` (b,) of the n tokens k, v (b, g, n, d), rotated within their parts."""
        n = k.shape[-2]
        last = min(n, self.slots)  # more tokens than that would overwrite each other
        token = count[:, None] - last + torch.arange(last, device=k.device)
        slot = (self.length[:, None] + token) % self.slots
        row = torch.arange(k.shape[0], device=k.device)[:, None]
        for kept, tokens in ((self.k, k), (self.v, v)):
            new, old = tokens[row, :, token.clamp(min=0)], kept[row, :, slot]  # (b, last, g, d)
            kept[row, :, slot] = torch.where(token[..., None, None] >= 0, new, old)
        self.length += count


def along_sequence(index: Tensor, t: Tensor) -> Tensor:
    """index (b, n) as `gather` and `scatter` want it for t (b, g, m, d)."""
    return repeat(index, "b n -> b g n d", g=t.shape[1], d=t.shape[3])


def rotate_keys(positions: PositionModule, k: Tensor, k_at: Tensor) -> Tensor:
    """k (b, g, n, d) rotated by k_at, alone."""
    return positions.rotate(k[..., :0, :], k, k_at[..., :0], k_at)[1]


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, positions: PositionModule, cache: KeyValueCache, count: Tensor
) -> Tensor:
    """Attention of n new tokens to all that the cache holds and to themselves, by the cache's pattern; appends them.

    Args:
        q: (b, h, n, d), not yet rotated.
        k, v: (b, g, n, d), k not yet rotated.
        count: how many of each row's tokens count, (b,); those after them are padding.

    Returns:
        (b, h, n, d). Not to be differentiated: it changes the cache in place.
    """
    if q.numel() == 0:
        return torch.zeros_like(q)
    n = q.shape[-2]
    q_at = cache.length[:, None] + torch.arange(n, device=q.device)
    k = rotate_keys(positions, k, (q_at % cache.part_size)[:, None])
    if n == 1:
        cache.append(k, v, count)
        return attend_parts(q, positions, cache, q_at[:, 0])
    if cache.block_size is None:
        cache.append(k, v, count)
        return attend_slots(q, positions, cache, q_at)
    attended = attend_laid_out(q, k, v, positions, cache, count)
    cache.append(k, v, count)
    return attended


def attend_parts(q: Tensor, positions: PositionModule, cache: KeyValueCache, q_at: Tensor) -> Tensor:
    """One query a row (b, h, 1, d) at q_at (b,), in one version for each part of the cache: (b, h, 1, d)."""
    p, dtype, bias = cache.part_size, at_least_float32(q.dtype), distance_bias_of(positions)
    slot = torch.arange(cache.slots, device=q.device)
    k_at = cache.token_positions(q_at + 1, slot)
    visible = k_at >= 0
    if cache.block_size is not None:
        visible = visible & (k_at // cache.block_size >= q_at[:, None] // cache.block_size - 1)
    # A part starts where its first slot's token is: the others of its visible tokens came after. A part without a token
    # in sight may start after the query.
    distance = (q_at[:, None] - k_at[:, ::p]).clamp(min=0)
    versions = repeat(q, "b h 1 d -> b h j d", j=distance.shape[1])
    versions, _ = positions.rotate(versions, q[..., :0, :], distance[:, None], distance[:, None, :0])
    versions = rearrange(versions, "b (g r) j d -> b g j r d", g=cache.k.shape[1])
    with torch.autocast(q.device.type, enabled=False):  # it would round the scores
        keys = rearrange(cache.k, "b g (j p) d -> b g j d p", p=p)
        scores = versions.to(dtype) @ keys.to(dtype) / q.shape[-1] ** 0.5
        scores = rearrange(scores, "b g j r p -> b (g r) 1 (j p)")
        if bias is not None:
            scores = scores + bias((q_at[:, None] - k_at)[:, None, None])
        weights = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1)
        weights = rearrange(weights.to(q.dtype), "b (g r) 1 s -> b g r s", g=cache.k.shape[1])
        attended = weights @ cache.v
    return rearrange(attended, "b g r d -> b (g r) 1 d")


def attend_slots(q: Tensor, positions: PositionModule, cache: KeyValueCache, q_at: Tensor) -> Tensor:
    """Queries (b, h, n, d) at q_at (b, n) on a dense cache that holds their keys already: (b, h, n, d)."""
    used = cache.slots
    if not torch.compiler.is_compiling():  # a graph that does not depend on the length looks at every slot
        used = -(-int(cache.length.max()) // cache.part_size) * cache.part_size
    k_at = torch.arange(used, device=q.device)
    written = k_at < cache.length[:, None]

    def window(rows: slice) -> tuple[slice, Tensor]:
        mask = written[:, None] & (k_at <= q_at[:, rows, None])
        return slice(0, used), mask[:, None]

    k_turned = k_at % cache.part_size
    return attend_windows(q, cache.k, cache.v, positions, q_at[:, None], k_at, window, k_turned=k_turned)


def attend_laid_out(
    q: Tensor, k: Tensor, v: Tensor, positions: PositionModule, cache: KeyValueCache, count: Tensor
) -> Tensor:
    """Queries (b, h, n, d) on a blockwise cache and on their own k, v (b, g, n, d), not yet in it: (b, h, n, d).

    Each row is laid out from the start of the block before the one that its first new token falls into.
    """
    n, w = q.shape[-2], cache.block_size
    assert w is not None
    blocks = (n + 2 * w - 2) // w  # that n tokens can touch
    first = (cache.length // w - 1) * w
    at = first[:, None] + torch.arange((blocks + 1) * w, device=q.device)  # (b, (blocks + 1) w)
    token = at - cache.length[:, None]
    # Places after a row's last token repeat it: they are hidden from it, and padding may hold anything.
    token = token.minimum(count[:, None] - 1)
    source = torch.where(token < 0, at % cache.slots, cache.slots + token)

    def laid_out(kept: Tensor, new: Tensor) -> Tensor:
        both = torch.cat((kept, new), dim=-2)
        return windows(both.gather(-2, along_sequence(source, both)), w)

    queries = q.gather(-2, along_sequence(token[:, w:].clamp(min=0), q))
    visible = (windows(at[..., None], w)[..., 0] >= 0)[:, None, None].expand(-1, 1, w, -1)
    attended = attend_blocks(
        fold(queries, w),
        laid_out(cache.k, k),
        laid_out(cache.v, v),
        positions,
        visible,
        part_size=cache.part_size,
    )
    attended = rearrange(attended, "(b j) h w d -> b h (j w) d", j=blocks)
    asked = (cache.length % w)[:, None] + torch.arange(n, device=q.device)
    return attended.gather(-2, along_sequence(asked, attended))
