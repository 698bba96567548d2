"""What arguments must be, said by the call that got them."""

import torch
from torch import Tensor


def is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def require_sizes(**sizes: int) -> None:
    """Raise ValueError for the first argument that is not above 0 and an integer."""
    for name, value in sizes.items():
        if not is_size(value):
            raise ValueError(f"{name} must be above 0 and an integer, got {value!r}")


def require_integers(name: str, value: Tensor, shape: torch.Size) -> None:
    """Raise ValueError if value is not int32 or int64, or of another shape."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor of integers, got {value!r}")
    if value.shape != shape or value.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be integers of shape {tuple(shape)}, got {value.dtype} {tuple(value.shape)}")
