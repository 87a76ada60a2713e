"""Which backend `auto` takes: the fastest by measurement, and `chunked` wherever nothing was measured.

Shape suffixes: B rows, K keys or columns, D features.
"""

import math
from typing import Final

import torch
from torch import Tensor

from reid_dist.kernels import triton_tiles
from reid_dist.kernels.checks import Backend
from reid_dist.kernels.measured import MEASURED, Measurement

OPS: Final = ("queue_attend", "pair_attend", "sdm", "siglip")
BACKENDS: Final = ("auto", "reference", "chunked", "triton")
_WITHOUT_TRITON: Final = ("sdm", "siglip")
# A measurement speaks for sizes up to this factor away in each of B, K and D.
_REACH: Final = 4.0


def choose(backend: Backend, op: str, rows_BD: Tensor, keys_KD: Tensor, products: torch.dtype | None = None) -> str:
    """The backend that a call runs on; `products` is the dtype of its products where it is not the keys'.

    Raises:
        ValueError: no such backend, or one asked for by name that cannot run this call.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it is one of {', '.join(BACKENDS)}")
    dtype = products or keys_KD.dtype
    if backend == "auto":
        return _fastest(keys_KD.device, rows_BD.shape[0], keys_KD.shape[0], keys_KD.shape[1], dtype, op)[0]
    if backend == "triton":
        reason = _why_no_triton(keys_KD.device, keys_KD.shape[1], dtype, op)
        if reason is not None:
            raise ValueError(f"backend 'triton': {reason}; use 'chunked' or 'auto'")
    return backend


def explain(
    device: torch.device | str, rows: int, keys: int, features: int, dtype: torch.dtype, op: str = "queue_attend"
) -> str:
    """Which backend `auto` takes for a call, and why: the measured row, or that there is none.

    Args:
        device: where the tensors are.
        rows: B, anchors.
        keys: K, keys or columns.
        features: D.
        dtype: of the keys.
        op: "queue_attend" (moco_nce and supcon_queue too), "pair_attend" (clip_contrastive too), "sdm" or "siglip".

    Raises:
        ValueError: no such op.
    """
    if op not in OPS:
        raise ValueError(f"op is {op!r}; it is one of {', '.join(OPS)}")
    name, reason = _fastest(torch.device(device), rows, keys, features, dtype, op)
    no_triton = _why_no_triton(torch.device(device), features, dtype, op)
    return f"{name}: {reason}" + (f" (triton: {no_triton})" if no_triton else "")


def _fastest(device: torch.device, rows: int, keys: int, features: int, dtype: torch.dtype, op: str) -> tuple[str, str]:
    """(backend, reason)."""
    kind = _device_kind(device.type, device.index)
    size = (rows, keys, features)
    near = [row for row in MEASURED.get((kind, op, dtype), ()) if _distance(size, row) <= math.log(_REACH)]
    if not near:
        return "chunked", f"{op} with B={rows} K={keys} D={features} {dtype} was not measured on {kind}"
    nearest = min(near, key=lambda row: _distance(size, row))
    times = ", ".join(f"{name} {time:g} ms" for name, time in nearest.milliseconds.items())
    where = f"B={nearest.rows} K={nearest.keys} D={nearest.features} {dtype} on {kind}"
    return min(nearest.milliseconds, key=nearest.milliseconds.__getitem__), f"fastest measured at {where}: {times}"


def _distance(size: tuple[int, int, int], row: Measurement) -> float:
    """The largest of the three sizes' ratios, as a logarithm."""
    pairs = zip(size, row[:3], strict=True)
    return max(abs(math.log(max(1, wanted) / measured)) for wanted, measured in pairs)


def _device_kind(device_type: str, index: int | None) -> str:
    if device_type == "cuda" and torch.cuda.is_available():
        return _gpu_name(index)
    return device_type


def _gpu_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


if torch.cuda.is_available():
    # A constant of the process: torch.compile need not look into it. Not without a GPU: this imports the compiler,
    # more than a second of every process.
    _gpu_name = torch.compiler.assume_constant_result(_gpu_name)  # type: ignore[no-untyped-call]


def _why_no_triton(device: torch.device, features: int, dtype: torch.dtype, op: str) -> str | None:
    if op in _WITHOUT_TRITON:
        return f"there is no kernel for {op}"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "this machine has no CUDA device"
    return triton_tiles.why_unsupported(device, features, dtype)
