"""A model's configuration as plain values, and the folder that holds it with the weights.

`config.json` and `model.safetensors` hold no code. safetensors is imported when a model is saved or loaded.
"""

import dataclasses
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from xpos_zoo.bias import ALiBi, LogNScaling, ScalableSoftmax, ScaleInvariant, SoftTail
from xpos_zoo.rotary import XPOS, RotaryEmbedding

CONFIG, WEIGHTS = "config.json", "model.safetensors"
HEADER = {"model_type": "xpos_zoo", "version": 3}
ADDED = {"qk_norm", "window_size", "output_gate"}  # keys that folders of earlier versions lack
# Nothing else is ever made from a configuration: a name in it is looked up here, never imported.
KNOWN: dict[str, tuple[type, ...]] = {
    "positions": (XPOS, RotaryEmbedding),
    "query_scaling": (LogNScaling, ScalableSoftmax),
    "distance_bias": (SoftTail, ScaleInvariant, ALiBi),
}
Named = dict[str, Any]  # the "name" of one of these, and its arguments but for head_dim


@dataclass(frozen=True)
class TransformerConfig:
    """All that says what a `Transformer` is but for its weights, in plain values that JSON can hold.

    The attributes are arguments of `Transformer`. Positions, query_scaling and distance_bias name a class of the
    library, with its arguments: {"name": "SoftTail", "power": 2, "trained_length": 128}. They and sizes are lists
    where layers differ. `Transformer.from_config` checks all values.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    positions: Named | list[Named] = dataclasses.field(default_factory=lambda: {"name": "XPOS"})
    block_size: int | list[int | None] | None = None
    window_size: int | list[int | None] | None = None
    query_scaling: Named | list[Named | None] | None = None
    distance_bias: Named | list[Named | None] | None = None
    qk_norm: bool = False
    output_gate: bool = False
    hidden_dim: int | None = None
    dropout: float = 0.0
    tie_embeddings: bool = True


def to_named(kind: str, thing: Any) -> Named | None:
    """What a configuration says of positions, query_scaling or distance_bias; ValueError if it cannot say it."""
    if thing is None:
        return None
    known = type(thing)
    if known not in KNOWN[kind]:
        raise ValueError(f"{kind} must be {names(kind)} to be saved, got {known.__name__}")
    arguments = {name: getattr(thing, name) for name in inspect.signature(known).parameters if name != "head_dim"}
    if kind == "positions" and known(thing.head_dim, **arguments).rates != thing.rates:
        raise ValueError(f"positions must have the rates of their arguments to be saved, got {thing} with others")
    return {"name": known.__name__, **arguments}


def from_named(kind: str, named: Any) -> Any:
    """The inverse of `to_named`; of positions, a function of head_dim. A list for a list.

    ValueError if the library has nothing of that name, TypeError if it has other arguments.
    """
    if isinstance(named, list):
        return [from_named(kind, each) for each in named]
    if named is None and kind != "positions":
        return None
    arguments = dict(named) if isinstance(named, dict) else {}
    name = arguments.pop("name", None)
    for known in KNOWN[kind]:
        if known.__name__ == name:
            return partial(known, **arguments) if kind == "positions" else known(**arguments)
    raise ValueError(f"{kind} must be a mapping with the name {names(kind)}, got {named!r}")


def names(kind: str) -> str:
    return " or ".join(known.__name__ for known in KNOWN[kind])


def write_folder(folder: Path, config: TransformerConfig, weights: dict[str, Tensor], overwrite: bool) -> None:
    """Write both files; each is whole or not there, whenever this is stopped."""
    torch_files = safetensors_torch()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give another path")
    present = [file for file in (folder / CONFIG, folder / WEIGHTS) if file.exists()]
    if present and not overwrite:
        raise ValueError(f"{present[0]} exists; give another path, or overwrite=True")
    content = {
        WEIGHTS: torch_files.save({name: tensor.contiguous() for name, tensor in weights.items()}, {"format": "pt"}),
        CONFIG: (json.dumps(HEADER | dataclasses.asdict(config), indent=2) + "\n").encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    drafts = {name: folder / f"{name}.draft" for name in content}
    try:
        for name, draft in drafts.items():
            draft.write_bytes(content[name])
        for name, draft in drafts.items():
            draft.replace(folder / name)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)


def read_folder(folder: Path, make: Callable[[TransformerConfig], Any], device: torch.device | str) -> Any:
    """The model that `make` makes of the configuration, with the weights, in their dtype."""
    torch_files = safetensors_torch()
    with errors_naming(folder / CONFIG), torch.device("meta"):
        config = read_config(folder / CONFIG)
        model = make(config)
    source = folder / WEIGHTS
    files, index = [source], folder / f"{WEIGHTS}.index.json"  # of a large model, which transformers cuts in pieces
    if index.exists() and not source.exists():
        source = index
        with errors_naming(index):
            names = {Path(name).name for name in json.loads(index.read_bytes())["weight_map"].values()}
            files = [folder / name for name in sorted(names)]
    weights: dict[str, Tensor] = {}
    for file in files:
        with errors_naming(file):
            loaded = torch_files.load_file(file, device=str(device))
            weights |= {name.removeprefix("model."): tensor for name, tensor in loaded.items()}  # transformers' prefix
    with errors_naming(source):
        if config.tie_embeddings:
            weights["head.weight"] = weights["embedding.weight"]
        model.load_state_dict(weights, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight
    return model.to(device).eval()


def read_config(file: Path) -> TransformerConfig:
    values = json.loads(file.read_bytes())
    for key, expected in HEADER.items():
        if not isinstance(values, dict) or values.pop(key, None) != expected:
            raise ValueError(f"must be a mapping with {key} {expected!r}")
    keys = {field.name for field in dataclasses.fields(TransformerConfig)}
    if "transformers_version" in values:  # it adds keys of its own
        values = {key: value for key, value in values.items() if key in keys}
    if wrong := sorted((keys ^ values.keys()) - ADDED):
        raise ValueError(f"{'lacks' if wrong[0] in keys else 'has an unknown'} {wrong[0]!r}")
    return TransformerConfig(**values)


@contextmanager
def errors_naming(file: Path) -> Iterator[None]:
    """Whatever is wrong with a file is a ValueError in one line that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"there is no {file}; `save_pretrained` writes one") from error
    except Exception as error:  # safetensors has a type of its own
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from error


def safetensors_torch() -> ModuleType:
    try:
        import safetensors.torch  # pyright: ignore[reportMissingImports] (optional)
    except ImportError as error:
        raise ValueError("saving and loading a model needs safetensors: `pip install safetensors`") from error
    return safetensors.torch
