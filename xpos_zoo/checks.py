"""What arguments must be, said by the call that got them."""

import operator
from typing import Any

import torch
from torch import Tensor


def as_integer(name: str, value: Any, least: int = 0, said: str | None = None) -> int:
    """value, a whole number of any type (numpy has its own), as an int; a ValueError if it is none or below `least`."""
    if isinstance(value, int) and not isinstance(value, bool):  # a compiler's dynamic numbers stay dynamic
        number = value
    else:
        number = operator.index(value) if hasattr(value, "__index__") and not isinstance(value, bool) else None
    if number is None or number < least:
        raise ValueError(f"{name} must be {said or f'{least} or above and an integer'}, got {value!r}")
    return number


def as_size(name: str, value: Any, said: str = "above 0 and an integer", even: bool = False) -> int:
    """As `as_integer`, above 0 and, if asked for, even."""
    number = as_integer(name, value, 1, said)
    if even and number % 2:
        raise ValueError(f"{name} must be {said}, got {value!r}")
    return number


def require_sizes(**sizes: int) -> None:
    """Raise ValueError for the first argument that is not above 0 and an integer."""
    for name, value in sizes.items():
        as_size(name, value)


def require_integers(name: str, value: Tensor, shape: torch.Size) -> None:
    """Raise ValueError if value is not int32 or int64, or of another shape."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor of integers, got {value!r}")
    if value.shape != shape or value.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be integers of shape {tuple(shape)}, got {value.dtype} {tuple(value.shape)}")
