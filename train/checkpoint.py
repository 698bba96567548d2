"""Reading checkpoints: whole, safely, and with an explanation where they do not fit."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from train.errors import UserError


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint's content, tensors and plain values alone.

    Raises:
        UserError: the file is missing, truncated, or no checkpoint of this trainer.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no exception type of its own for a damaged file
        raise UserError(f"{path} is not a whole checkpoint: damaged, truncated, or of another kind") from error
    if not isinstance(content, dict) or "state_dict" not in content or "hyper_parameters" not in content:
        raise UserError(f"{path} is not a checkpoint of this trainer: it holds no state_dict and hyper_parameters")
    return content


def check_fits(state_dict: dict[str, torch.Tensor], model: nn.Module, path: Path) -> None:
    """Raise a `UserError` that lists how the checkpoint's weights differ from the model's, if they do."""
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
