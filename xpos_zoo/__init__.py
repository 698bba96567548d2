"""xPos attention for PyTorch: matches the xPos formula up to rounding, at any length and precision, compiled or not."""

from xpos_zoo.attention import MultiHeadAttention
from xpos_zoo.bias import ALiBi, DistanceBias, LogNScaling, QueryScaling, ScalableSoftmax, ScaleInvariant, SoftTail
from xpos_zoo.cache import KeyValueCache
from xpos_zoo.functional import (
    apply_rotary_pos_emb,
    duplicate_interleave,
    fixed_pos_embedding,
    rotate_every_two,
)
from xpos_zoo.plan import LayerPlan, plan_attention
from xpos_zoo.pretrained import TransformerConfig
from xpos_zoo.rotary import XPOS, PositionModule, RotaryEmbedding
from xpos_zoo.transformer import Transformer

__all__ = [
    "XPOS",
    "ALiBi",
    "DistanceBias",
    "KeyValueCache",
    "LayerPlan",
    "LogNScaling",
    "MultiHeadAttention",
    "PositionModule",
    "QueryScaling",
    "RotaryEmbedding",
    "ScalableSoftmax",
    "ScaleInvariant",
    "SoftTail",
    "Transformer",
    "TransformerConfig",
    "apply_rotary_pos_emb",
    "duplicate_interleave",
    "fixed_pos_embedding",
    "plan_attention",
    "rotate_every_two",
]
