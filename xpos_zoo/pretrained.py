"""A model as a folder that says all of itself: `config.json`, and weights without code in `model.safetensors`.

Needs safetensors, which is imported only when a model is saved or loaded.
"""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from xpos_zoo.bias import LogNScaling, SoftTail
from xpos_zoo.rotary import RotaryEmbedding
from xpos_zoo.xpos import XPOS

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT = "xpos_zoo.Transformer"
VERSION = 1
# Nothing else is ever made from a file: a name in it is looked up here, never imported.
KNOWN: dict[str, dict[str, tuple[Callable[..., Any], tuple[str, ...]]]] = {
    "positions": {
        "XPOS": (XPOS, ("scale_base", "base", "max_wavelength", "interleaved")),
        "RotaryEmbedding": (RotaryEmbedding, ("base", "max_wavelength", "interleaved")),
    },
    "query_scaling": {"LogNScaling": (LogNScaling, ("coefficient", "trained_length"))},
    "distance_bias": {"SoftTail": (SoftTail, ("power", "trained_length"))},
}


def describe(kind: str, thing: Any) -> dict[str, Any] | None:
    """The name and the options of one of the library's own things; None for None.

    Raises:
        ValueError: it is none of these.
    """
    if thing is None:
        return None
    name = type(thing).__name__
    known, options = KNOWN[kind].get(name, (None, ()))
    if known is None or type(thing) is not known:
        raise ValueError(f"{kind} must be {' or '.join(KNOWN[kind])} to be saved, got {name}")
    given = {option: getattr(thing, option) for option in options}
    if kind == "positions" and known(thing.head_dim, **given).rates != thing.rates:
        raise ValueError(f"positions must have the rates of their options to be saved, got {thing} with others")
    return {"name": name} | given


def described(kind: str, description: Any) -> Any:
    """What a description describes: for positions, what makes them for a head_dim. None for None, but for positions.

    Raises:
        ValueError: the library has no such thing, or it has other options.
    """
    if description is None and kind != "positions":
        return None
    names = " or ".join(KNOWN[kind])
    if not isinstance(description, dict) or not isinstance(description.get("name"), str):
        raise ValueError(f"{kind} must be a mapping with the name {names}, got {description!r}")
    name = description["name"]
    if name not in KNOWN[kind]:
        raise ValueError(f"{kind} must be {names}, got {name!r}")
    make, options = KNOWN[kind][name]
    given = {option: value for option, value in description.items() if option != "name"}
    if given.keys() != set(options):
        raise ValueError(f"{kind} {name} must have the options {', '.join(options)}, got {', '.join(given) or 'none'}")
    return partial(make, **given) if kind == "positions" else make(**given)


def write_folder(
    path: str | os.PathLike[str], config: dict[str, Any], weights: dict[str, Tensor], overwrite: bool
) -> None:
    """Write both files; each is whole or not there, whenever this is stopped.

    Raises:
        ValueError: there is one already, and overwrite is False; path is a file; or safetensors is not installed.
        OSError: they cannot be written.
    """
    torch_files = safetensors_torch()
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give another path")
    present = [file for file in (folder / CONFIG, folder / WEIGHTS) if file.exists()]
    if present and not overwrite:
        raise ValueError(f"{present[0]} exists; give another path, or overwrite=True")
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        WEIGHTS: torch_files.save({name: tensor.contiguous() for name, tensor in weights.items()}, {"format": "pt"}),
        CONFIG: (json.dumps({"format": FORMAT, "version": VERSION} | config, indent=2) + "\n").encode(),
    }
    drafts = {name: folder / f"{name}.draft" for name in content}
    try:
        for name, draft in drafts.items():
            draft.write_bytes(content[name])
        for name, draft in drafts.items():
            draft.replace(folder / name)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)


def read_config(path: str | os.PathLike[str], keys: set[str]) -> dict[str, Any]:
    """The configuration in the folder, with just these keys.

    Raises:
        ValueError: the file is missing, damaged, or of another program, version or kind of model.
    """
    file = Path(path) / CONFIG
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"there is no {file}; `save_pretrained` writes one") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.pop("format", None) != FORMAT:
        raise ValueError(f'{file} is of another program: its "format" must be "{FORMAT}"')
    if (version := config.pop("version", None)) != VERSION:
        raise ValueError(f"{file} has version {version!r}, this xpos_zoo reads {VERSION}")
    if wrong := sorted(keys ^ config.keys()):
        raise ValueError(f"{file} {'lacks' if wrong[0] in keys else 'has an unknown'} {wrong[0]!r}")
    return config


def read_weights(path: str | os.PathLike[str], model: nn.Module, device: torch.device | str) -> dict[str, Tensor]:
    """The weights in the folder, which are those of `model` by name and shape; what it ties may be there once.

    Raises:
        ValueError: the file is missing, damaged, or of another model; or safetensors is not installed.
    """
    torch_files = safetensors_torch()
    file = Path(path) / WEIGHTS
    if not file.is_file():
        raise ValueError(f"there is no {file}; `save_pretrained` writes one")
    try:
        weights = torch_files.load_file(file, device=str(device))
    except Exception as error:  # for a damaged file, safetensors has a type of its own
        raise ValueError(f"{file} is damaged, or no safetensors file: {error}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in own_weights(model).items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"{file} is not of the model in {CONFIG}: {name} is {found.get(name, 'missing')}, "
                f"and {expected.get(name, 'absent')} in the model"
            )
    return weights


def own_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with each parameter once: a tied one under the first of its names."""
    once = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    return {name: tensor for name, tensor in model.state_dict().items() if name in once}


def safetensors_torch() -> ModuleType:
    try:
        import safetensors.torch  # pyright: ignore[reportMissingImports] (optional)
    except ImportError as error:
        raise ValueError("saving and loading a model needs safetensors: `pip install safetensors`") from error
    return safetensors.torch
