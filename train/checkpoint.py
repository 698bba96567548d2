"""What is in a checkpoint, is it whole, and does it fit? Lightning writes and reads them."""

import io
import json
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from train.errors import UserError
from train.files import replacing
from train.tokens import FILE
from xpos_zoo import XPOS

CONTENT = {"state_dict", "hyper_parameters", "datamodule_hyper_parameters", "global_step"}
# Options of data and model that change no number, or as much as other devices do.
FREE = {"num_workers", "cache", "compile", "checkpoint_activations", "context_parallel_size"}
# Options of the model that runs of earlier versions lack.
ADDED: dict[str, Any] = {"qk_norm": False, "output_gate": False, "window_size": None}
EXPORTED = "training.json"  # beside an exported model: what its checkpoint says of its training
DATA = "TextData"  # what of a checkpoint is the text's
INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"


class CheckpointFiles(TorchCheckpointIO):
    """Writes a checkpoint beside the one before it, then in its place: whenever that is stopped, one of them is whole.

    Lightning's own brings its draft from the temporary folder, often another disk: a copy that can be cut short.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        content = io.BytesIO()
        torch.save(checkpoint, content)
        try:
            with replacing(Path(path)) as draft:
                draft.write_bytes(content.getbuffer())
        except OSError as error:
            raise UserError(
                f"the checkpoint {path} cannot be written: {error.strerror}; any one before it is whole; "
                "mend that, and the same command goes on"
            ) from error


def last_checkpoint_of(run: Path) -> Path:
    return run / "checkpoints" / "last.ckpt"


def find_checkpoint(path: str) -> Path:
    """The checkpoint that is named, or the last one of the run whose folder is."""
    return last_checkpoint_of(Path(path)) if Path(path).is_dir() else Path(path)


def find_trained(path: str) -> Path:
    """As `find_checkpoint`, or what an exported model says of its training, if this is the folder of one."""
    return Path(path) / EXPORTED if (Path(path) / EXPORTED).exists() else find_checkpoint(path)


def load_trained(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, or of an exported model all but its weights and its optimizer.

    Raises:
        UserError: as `load_checkpoint`.
    """
    if path.name != EXPORTED:
        return load_checkpoint(path)
    try:
        content = json.loads(path.read_text())
        content["hyper_parameters"] = as_of_now(content["hyper_parameters"])
        if (tokens := path.parent / FILE).exists():
            content[DATA]["tokenizer"] = tokens.read_text(encoding="utf-8")
        return {name: content[name] for name in (*CONTENT - {"state_dict"}, DATA)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged, or no file of `python -m train.export`") from error


def tokenizer_json_in(content: dict[str, Any]) -> str | None:
    """The tokenizer.json of a checkpoint's tokens; None if its data says nothing of them."""
    return content.get(DATA, {}).get("tokenizer")


def write_trained(folder: Path, content: dict[str, Any]) -> None:
    """Write what a checkpoint says of its training beside the exported model."""
    kept = {name: content[name] for name in CONTENT - {"state_dict"}} | {DATA: content.get(DATA, {})}
    data = kept["datamodule_hyper_parameters"]
    kept["datamodule_hyper_parameters"] = {name: value for name, value in data.items() if name not in FREE}
    kept[DATA] = {name: value for name, value in kept[DATA].items() if name != "tokenizer"}
    with replacing(folder / EXPORTED) as draft:
        draft.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint's content, tensors and plain values alone.

    Raises:
        UserError: the file is missing, truncated, or no checkpoint of this trainer.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; `python -m train fit` writes one")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no exception type of its own for a damaged file
        raise UserError(
            f"{path} is no checkpoint, or a damaged one: give one that `python -m train fit` wrote, or remove it"
        ) from error
    if not isinstance(content, dict) or not content.keys() >= CONTENT:
        raise UserError(f"{path} is no checkpoint of this trainer: one holds {', '.join(sorted(CONTENT))}")
    for group in ("hyper_parameters", "datamodule_hyper_parameters"):
        if (maker := content[group].get("_instantiator", INSTANTIATOR)) != INSTANTIATOR:  # Lightning would call it
            raise UserError(f"{path} is no checkpoint of this trainer: it wants {maker!r} called")
    return content | {"hyper_parameters": as_of_now(content["hyper_parameters"])}


def as_of_now(model: dict[str, Any]) -> dict[str, Any]:
    """The options of a model, also of 0.2.0, where the scale_base of XPOS stood beside positions with the default."""
    if model.get("scale_base") is None:
        return model

    defaults = {name: each.default for name, each in signature(XPOS).parameters.items() if name != "head_dim"}

    def with_its_own(layer: Any) -> Any:
        layer = {"class_path": layer, "init_args": defaults} if layer == "xpos_zoo.XPOS" else layer
        own = layer.get("init_args", {}) if isinstance(layer, dict) else {}
        unset = own.get("scale_base") == defaults["scale_base"]
        return layer | {"init_args": own | {"scale_base": model["scale_base"]}} if unset else layer

    layers = model["positions"]
    positions = [with_its_own(layer) for layer in layers] if isinstance(layers, list) else with_its_own(layers)
    return model | {"positions": positions, "scale_base": None}


def difference(there: Any, here: Any, name: str = "") -> str:
    """The first setting below `name` in which two configurations differ, in words; nothing if there is none."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted(there.keys() | here.keys())
        found = (difference(there.get(key), here.get(key), f"{name}.{key}".lstrip(".")) for key in keys)
        return next(filter(None, found), "")
    return "" if there == here else f"{name}: {there} there, {here} here"
