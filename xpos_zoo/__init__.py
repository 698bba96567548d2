"""xPos attention for PyTorch: exact at any length, in any precision, compiled or not."""

from xpos_zoo.attention import MultiHeadAttention, Temperature
from xpos_zoo.bias import DistanceBias, SoftTail
from xpos_zoo.cache import KeyValueCache
from xpos_zoo.dense import PositionModule
from xpos_zoo.rotary import (
    RotaryEmbedding,
    apply_rotary_pos_emb,
    duplicate_interleave,
    fixed_pos_embedding,
    rotate_every_two,
)
from xpos_zoo.transformer import Transformer
from xpos_zoo.xpos import XPOS

__all__ = [
    "XPOS",
    "DistanceBias",
    "KeyValueCache",
    "MultiHeadAttention",
    "PositionModule",
    "RotaryEmbedding",
    "SoftTail",
    "Temperature",
    "Transformer",
    "apply_rotary_pos_emb",
    "duplicate_interleave",
    "fixed_pos_embedding",
    "rotate_every_two",
]
