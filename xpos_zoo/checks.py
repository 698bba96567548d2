"""What arguments must be, said by the call that got them."""

import math
import operator
from typing import Any

import torch
from torch import Tensor


def as_integer(
    name: str, value: Any, least: int = 1, allowed: str = "above 0 and an integer", even: bool = False
) -> int:
    """`value`, of any integer type (numpy has its own), as an int; a ValueError if it is not what is `allowed`."""
    try:
        number = value if isinstance(value, (int, torch.SymInt)) else operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least or (even and number % 2):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return number  # type: ignore[return-value]


def as_number(name: str, value: Any, positive: bool = True) -> float:
    """`value`, of any numeric type (numpy's, or a tensor of one element), as a plain number; ValueError if it is
    negative, infinite, no number, or 0 though it must be positive."""
    foreign = isinstance(value, Tensor) or type(value).__module__ == "numpy"
    number: Any = value.reshape(-1)[0].item() if foreign and math.prod(value.shape) == 1 else value
    finite = isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
    if not finite or number < 0 or (positive and number == 0):
        raise ValueError(f"{name} must be {'above 0' if positive else '0 or above'} and finite, got {value!r}")
    return number


def as_sizes(**sizes: Any) -> list[int]:
    """These arguments as plain integers; ValueError for the first that is not an integer above 0."""
    return [as_integer(name, value) for name, value in sizes.items()]


def require_integers(name: str, value: Any, shape: torch.Size) -> None:
    """Raise ValueError if `value` is not an int32 or int64 tensor of this shape."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor of integers, got {value!r}")
    if value.shape != shape or value.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be integers of shape {tuple(shape)}, got {value.dtype} {tuple(value.shape)}")
