"""Checkpoints: written whole, read safely, and with an explanation where they do not fit."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from train.errors import UserError
from train.files import replacing

CONTENT = {"state_dict", "hyper_parameters", "datamodule_hyper_parameters", "global_step"}
UNSHAPED = ("positions", "scale_base", "num_heads")


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's own brings its draft from the temporary folder, often another disk: a copy that can be cut short."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with replacing(Path(path)) as draft:
            super().save_checkpoint(checkpoint, draft, storage_options)


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
    return content


def check_fits(checkpoint: dict[str, Any], model: L.LightningModule, path: Path) -> None:
    """Raise a `UserError` that says how the checkpoint's model differs from `model` in what it computes, if it does."""
    # No shape tells these; shapes tell all the others, but for block_size, which any model may be evaluated with.
    there, here = ({k: h.get(k) for k in UNSHAPED} for h in (checkpoint["hyper_parameters"], model.hparams))
    if changed := difference(there, here, "model"):
        raise UserError(f"{path} belongs to another model: {changed}")
    state_dict = checkpoint["state_dict"]
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    differences = [
        f"{name} is {theirs.get(name, 'missing')} in the checkpoint, {ours.get(name, 'absent')} in the model"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if differences:
        more = f", and {len(differences) - 1} more" if len(differences) > 1 else ""
        raise UserError(f"{path} belongs to another model: {differences[0]}{more}")


def difference(there: Any, here: Any, name: str = "") -> str:
    """The first setting below `name` in which two configurations differ, in words; nothing if there is none."""
    if there == here:
        return ""
    if isinstance(there, dict) and isinstance(here, dict):
        inner = next(key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key))
        return difference(there.get(inner), here.get(inner), f"{name}.{inner}" if name else inner)
    return f"{name}: {there} there, {here} here"
