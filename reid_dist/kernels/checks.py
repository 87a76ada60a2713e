"""What every backend shares: the meaning of ids and masks, and the checks of a call.

Shape suffixes: B rows (anchors), K keys, G columns, D features, U ids.
"""

from typing import Final, Literal

import torch
from torch import Tensor

EMPTY: Final = -1
"""Id of a slot that is never counted, whatever its contents."""
RANDOM: Final = -2
"""Id of a slot that is counted and equal to nobody (an initial random key)."""

Backend = Literal["auto", "reference", "chunked", "triton"]
Mask = Literal["identity", "none", "positives"]
MASKS: Final[tuple[Mask, ...]] = ("identity", "none", "positives")
"""A mask's position is its number in the operators."""

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_features(**features: Tensor) -> None:
    """Every tensor is floating, has two dimensions and the same number of features.

    Raises:
        ValueError: wrong number of dimensions, or different feature sizes.
        TypeError: not a floating dtype; or float64 mixed with others.
    """
    first_name, first = next(iter(features.items()))
    for name, x in features.items():
        if x.dtype not in _FLOATS:
            raise TypeError(f"{name} has dtype {x.dtype}; features are float64, float32, bfloat16 or float16")
        if x.dim() != 2:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; features are (rows, D)")
        if x.shape[1] != first.shape[1]:
            raise ValueError(f"{name} has {x.shape[1]} features per row, {first_name} has {first.shape[1]}")
        if (x.dtype == torch.float64) != (first.dtype == torch.float64):
            raise TypeError(f"{name} is {x.dtype} and {first_name} {first.dtype}; float64 mixes with nothing else")


def check_ids(name: str, ids: Tensor, rows: int) -> None:
    """Ids are int32, one per row.

    Raises:
        TypeError: another dtype.
        ValueError: another shape.
    """
    if ids.dtype != torch.int32:
        raise TypeError(f"{name} has dtype {ids.dtype}; ids are int32")
    if ids.dim() != 1 or ids.shape[0] != rows:
        raise ValueError(f"{name} has shape {tuple(ids.shape)}; there are {rows} rows, each with one id")


def check_scale(name: str, x: Tensor) -> None:
    """A trainable scalar: one floating element.

    Raises:
        ValueError: more or fewer elements.
        TypeError: not floating.
    """
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}; it is a floating tensor")
    if x.shape not in ((), (1,)):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it is () or (1,)")


def mask_number(mask: Mask) -> int:
    """The operators' number of a mask.

    Raises:
        ValueError: no such mask.
    """
    if mask not in MASKS:
        raise ValueError(f"mask is {mask!r}; it is one of {', '.join(MASKS)}")
    return MASKS.index(mask)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of everything that is summed: float32, and float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(wide_dtype(x.dtype))
