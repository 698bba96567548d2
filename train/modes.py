"""How a trained model attends when it is measured.

Dense; with one of the two options that keep the whole context softly (temperature, soft tail); with one of three
windows (blockwise, sliding, recompute); or, for RoPE alone, with its angles rescaled to the context (NTK-aware, YaRN).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from train.baselines import SlidingWindow, YaRN, ntk_scaled
from xpos_zoo import DistanceBias, LogNScaling, PositionModule, SoftTail, Transformer

STANDARD_MODES = ("dense", "temperature", "tail", "BCA", "sliding", "recompute")


@dataclass(frozen=True)
class Mode:
    """How a trained model attends when it is measured.

    Attributes:
        block_size: what layers are set to that were trained without blocks. Trained blocks belong to the model.
        query_scaling, distance_bias: what all layers are set to.
        recompute: whether targets are predicted from fresh windows of the trained length, half a length apart.
        rescale: gives a rotary module with its angles rescaled for a context of so many trained lengths.
    """

    name: str
    label: str
    block_size: int | None = None
    query_scaling: LogNScaling | None = None
    distance_bias: DistanceBias | None = None
    recompute: bool = False
    rescale: Callable[[Any, float], PositionModule] | None = None

    def set_on(self, model: Transformer) -> None:
        """Have a model, in no other mode so far, attend so."""
        model.block_size = [attention.block_size or self.block_size for attention in model.attentions]
        model.query_scaling, model.distance_bias = self.query_scaling, self.distance_bias

    def reach(self, layers: int, length: int) -> int | None:
        """The most tokens, a query's own included, that any path through all layers brings to it; None if unbounded.

        Blockwise, a layer goes from a token's block to the start of the block before; it is farthest for a query at its
        block's end: its own block, and one block more a layer. `length` is the trained one.
        """
        if self.recompute:
            return length
        if self.block_size:
            return (layers + 1) * self.block_size
        if isinstance(self.distance_bias, SlidingWindow):
            return layers * (self.distance_bias.size - 1) + 1
        return None

    def fits(self, encoding: str) -> bool:
        """Whether models of this encoding can be measured so: angles of rotary embeddings alone can be rescaled."""
        return self.rescale is None or encoding == "RoPE"


def all_modes(length: int, temperature: float = 0.2, tail: float = 2.0) -> dict[str, Mode]:
    """Every mode for models trained at `length`, by name."""
    found = [
        Mode("dense", "dense"),
        Mode("temperature", f"dense, temperature {temperature:g}", query_scaling=LogNScaling(temperature, length)),
        Mode("tail", f"dense, soft tail {tail:g}", distance_bias=SoftTail(tail, length)),
        Mode("BCA", f"BCA, blocks of {length // 2}", block_size=length // 2),
        Mode("sliding", f"sliding window of {length}", distance_bias=SlidingWindow(length)),
        Mode("recompute", f"recompute the last {length}", recompute=True),
        Mode("NTK", "dense, NTK-aware", rescale=ntk_scaled),
        Mode("YaRN", "dense, YaRN", rescale=partial(YaRN, trained_length=length)),
    ]
    return {mode.name: mode for mode in found}
