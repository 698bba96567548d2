"""Which models are compared, as options of `fit`: positions, and what logits become, by `train.runs.encoding_of`."""

from itertools import product
from typing import Any

Options = dict[str, Any]  # of train.language_model.LanguageModel

PARTIAL = "partial xPos, ScaleInvariant"  # configs/long.yaml
P_ROPE = "p-RoPE, ScaleInvariant"
DISCOUNT = 2.0  # set on trained models of the first
HEADLINE = ("RoPE", "xPos", PARTIAL, P_ROPE, "xPos, ScaleInvariant")
BASE = 1024  # which the authors of scale-invariant p-RoPE have in effect


def recipes(length: int, num_heads: int) -> dict[str, Options]:
    """All encodings with all logits that they make sense with, for models trained at `length`."""
    slow = {"max_wavelength": length}
    positions = {
        "RoPE": module("RotaryEmbedding"),
        "xPos": module("XPOS"),
        "p-RoPE": module("RotaryEmbedding", **slow),
        "partial xPos": module("XPOS", **slow),
        "no positions": module("study.encodings.NoPositions"),
    }
    alibi = {"name": "ALiBi", "num_heads": num_heads}
    logits = {
        "": {},
        ", ScalableSoftmax": {"query_scaling": {"name": "ScalableSoftmax", "trained_length": length}},
        ", ScaleInvariant": {"distance_bias": {"name": "ScaleInvariant"}},
    }
    both = module("study.encodings.ALiBiScaleInvariant", num_heads=num_heads)
    found = {
        encoding + by: {"positions": positions[encoding], **logits[by]} for encoding, by in product(positions, logits)
    }
    for by, own in logits.items():
        bias = both if "distance_bias" in own else alibi
        found["ALiBi" + by] = {"positions": positions["no positions"], **own, "distance_bias": bias}
    return found


def with_qk_norm(length: int, num_heads: int) -> dict[str, Options]:
    """Recipes of the headline with QK-norm, and p-RoPE with another base, too."""
    known = recipes(length, num_heads)
    found = {f"{name}, QK-norm": known[name] | {"qk_norm": True} for name in HEADLINE if name != "xPos"}
    based = {"positions": module("RotaryEmbedding", max_wavelength=length, base=BASE), "qk_norm": True}
    return found | {f"p-RoPE of base {BASE}, ScaleInvariant, QK-norm": known[P_ROPE] | based}


def hybrids(length: int, num_heads: int, num_layers: int) -> dict[str, Options]:
    """Layers that differ: local ones of xPos, blockwise, below one global layer; and all pairs below partial xPos."""
    known, below = recipes(length, num_heads), num_layers - 1
    pairs = [module("XPOS")] * below + [known[PARTIAL]["positions"]]
    all_see_all = f"partial xPos in the last of {num_layers} layers, xPos below, ScaleInvariant"
    found = {all_see_all: known[PARTIAL] | {"positions": pairs}}
    for size, name in product((length // 8, length // 4), ("no positions, ScalableSoftmax", PARTIAL)):
        options = {"block_size": [size] * below + [None], "positions": [module("XPOS")] * below}
        options["positions"] += [known[name]["positions"]]
        options |= {key: [None] * below + [value] for key, value in known[name].items() if key != "positions"}
        found[f"{below} local layers (xPos, BCA of {size}), 1 global: {name}"] = options
    return found


def ablations(length: int) -> dict[str, Options]:
    """The recipe of configs/long.yaml with one thing changed."""

    def changed(positions: Options | None = None, bias: Options | None = None, **options: Any) -> Options:
        bias = {"name": "ScaleInvariant", "tau": 10} | (bias or {})
        return {"positions": positions or module("XPOS", max_wavelength=length), "distance_bias": bias, **options}

    cuts = {"L/4": length // 4, "L/2": length // 2, "2 L": 2 * length, "4 L": 4 * length}
    found = {
        f"pairs slower than {name} left out": changed(module("XPOS", max_wavelength=n)) for name, n in cuts.items()
    }
    found |= {f"tau {tau}": changed(bias={"tau": tau}) for tau in (3, 30)}
    found |= {f"scale_base {name}": changed(scale_base=n) for name, n in (("L/4", length / 4), ("2 L", 2 * length))}
    for part in ("gain", "bias"):
        found[f"{part} alone"] = changed() | {"distance_bias": module(f"study.encodings.{part.capitalize()}Alone")}
    return found


def module(name: str, **arguments: Any) -> Options:
    return {"class_path": name, "init_args": arguments}
