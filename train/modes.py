"""How a trained model attends when it is measured, without any training."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

from xpos_zoo import DistanceBias, LogNScaling, QueryScaling, ScaleInvariant, SoftTail, Transformer

# What a mode may give to layers that have nothing of the group.
SETTINGS = (("block_size", "window_size"), ("query_scaling",), ("distance_bias",))


@dataclass(frozen=True)
class Mode:
    """What layers get that were trained without it, and how tables call that: no two modes share a label."""

    name: str
    label: str
    block_size: int | None = None
    window_size: int | None = None
    query_scaling: QueryScaling | None = None
    distance_bias: DistanceBias | None = None
    recompute: bool = False  # predict from fresh windows of the trained length, half a length apart
    rescale: Callable[[Any, float], dict[str, Any]] | None = None  # settings for positions and so many trained lengths

    def takes(self, trained: dict[str, Any]) -> bool:
        """Whether this changes nothing of the settings that layers were trained with, such as a bias of their own."""
        return not any(
            any(map(trained.get, group)) and any(getattr(self, name) for name in group) for group in SETTINGS
        )

    def set_on(self, model: Transformer) -> None:
        """Have a model, in no other mode so far, attend so."""
        for attention in model.attentions:
            for group in SETTINGS:
                if all(getattr(attention, name) is None for name in group):
                    attention.set_attention(**{name: getattr(self, name) for name in group})


@dataclass(frozen=True)
class Discount(Mode):
    """For models that were trained with `ScaleInvariant`, and no discount, in all layers: with this one's discount."""

    def takes(self, trained: dict[str, Any]) -> bool:
        bias = trained.get("distance_bias")
        layers = bias if isinstance(bias, list) else [bias]
        return all(own and own["name"] == "ScaleInvariant" and not own.get("discount") for own in layers)

    def set_on(self, model: Transformer) -> None:
        for attention in model.attentions:
            own, bias = cast(ScaleInvariant, attention.distance_bias), cast(ScaleInvariant, self.distance_bias)
            attention.distance_bias = replace(bias, tau=own.tau)


def standard_modes(length: int, log_n: float = 0.2, tail: float = 2.0) -> list[Mode]:
    """For models trained at `length`: dense; the whole context, softly (`LogNScaling`, `SoftTail`); three windows."""
    return [
        Mode("dense", "dense"),
        Mode("log-n", f"dense, log-n {log_n:g}", query_scaling=LogNScaling(log_n, length)),
        Mode("tail", f"dense, soft tail {tail:g}", distance_bias=SoftTail(tail, length)),
        Mode("BCA", f"BCA, blocks of {length // 2}", block_size=length // 2),
        Mode("sliding", f"sliding window of {length}", window_size=length),
        Mode("recompute", f"recompute the last {length}", recompute=True),
    ]


def discounted(length: int, discount: float) -> Mode:
    """For models with scale-invariant logits that were trained at `length`; ValueError as `ScaleInvariant` has it."""
    bias = ScaleInvariant(discount=discount, trained_length=length)
    return Discount("discount", f"dense, discount {discount:g}", distance_bias=bias)
