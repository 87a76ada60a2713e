"""How the triton kernels are laid out on each GPU, and where they run; needs no triton.

The numbers were chosen by ahead-of-time compilation (tests/kernels/test_triton_compiled.py: no spills, within shared
memory). No speed on a GPU has been measured yet, and none is tried out at run time: that would cost the first step
seconds and make results depend on timings.
Shape suffixes: K keys, D features.
"""

import functools
import importlib.util
import os
from typing import Final, NamedTuple

import torch

INTERPRETED: Final = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "y", "on", "yes", "true")
"""Whether kernels run in Triton's interpreter, on the CPU: as the environment was when this was first imported."""


class Tile(NamedTuple):
    """The part of a product that one program of a kernel has at a time."""

    rows: int
    """Rows that a program owns; it loops over the other side."""
    keys: int
    """Keys (columns) of one turn of its loop."""
    warps: int
    stages: int
    """Depth of the pipeline of loads."""
    step: int
    """Features of one piece of the first product: all in bfloat16, whose operands stay in shared memory."""
    spread: bool = False
    """Hides the first product in a branch that is always taken. Triton spreads the warps of a product that it sees to
    feed another over rows only; with fewer than 16 rows for each warp, some of them repeat the others' work."""


# By compute capability and dtype, then by D rounded up to a power of two. A GPU or a D that is not here is refused.
# float32 has ordinary multiplications only (TF32 would cost the gradients their digits): right, and slow.
_FLOAT32: Final = {
    64: Tile(32, 32, 4, 2, 32),
    128: Tile(32, 32, 4, 2, 32),
    256: Tile(32, 32, 8, 2, 32),
    512: Tile(16, 32, 8, 2, 32),
}
TILES: Final[dict[tuple[int, torch.dtype], dict[int, Tile]]] = {
    (80, torch.bfloat16): {
        64: Tile(128, 64, 8, 3, 64),
        128: Tile(128, 32, 8, 3, 128),
        256: Tile(64, 64, 8, 2, 256),
        512: Tile(64, 32, 8, 3, 512),
    },
    (90, torch.bfloat16): {
        64: Tile(128, 64, 8, 5, 64),
        128: Tile(128, 64, 8, 5, 128),
        256: Tile(128, 64, 8, 5, 256),
        512: Tile(64, 64, 8, 3, 512, spread=True),
    },
    (100, torch.bfloat16): {
        64: Tile(128, 64, 8, 3, 64),
        128: Tile(128, 64, 8, 3, 128),
        256: Tile(128, 64, 8, 3, 256),
        512: Tile(64, 64, 8, 3, 512, spread=True),
    },
    (80, torch.float32): _FLOAT32,
    (90, torch.float32): _FLOAT32,
    (100, torch.float32): _FLOAT32,
}
_TABLE_OF: Final = {(8, 0): 80, (9, 0): 90, (10, 0): 100, (10, 3): 100}

PROGRAMS: Final = 128
"""Programs that keep a large GPU busy: pairs are split so that there are about as many."""
MAX_SPLITS: Final = 32
WORKSPACE_BYTES: Final = 32 << 20
"""Most memory for the parts of the splits of a queue; rows are taken in as many launches as that needs."""


def why_unsupported(device: torch.device, features: int, dtype: torch.dtype) -> str | None:
    """Why there is no tile for such a call; None where the kernels run.

    Args:
        device: where the tensors are.
        features: D.
        dtype: of the keys.
    """
    if not _installed():
        return "triton is not installed (torch brings it on Linux)"
    if device.type != "cuda" and not INTERPRETED:
        return f"the triton kernels run on a CUDA device (on the CPU only under TRITON_INTERPRET=1), not on {device}"
    capability = (9, 0) if INTERPRETED else torch.cuda.get_device_capability(device)
    if capability not in _TABLE_OF:
        return f"no triton tile was compiled for compute capability {capability[0]}.{capability[1]}"
    tiles = TILES.get((_TABLE_OF[capability], dtype))
    if tiles is None:
        return f"no triton tile was compiled for {dtype}; there are bfloat16 and float32"
    if features > max(tiles):
        return f"the largest triton tile of {dtype} has {max(tiles)} features, not {features}"
    return None


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def tile_of(device: torch.device, features: int, dtype: torch.dtype) -> Tile:
    """The tile of a call.

    Raises:
        ValueError: the kernels do not run there; the text of `why_unsupported`.
    """
    reason = why_unsupported(device, features, dtype)
    if reason is not None:
        raise ValueError(f"backend 'triton': {reason}; use 'chunked' or 'auto'")
    capability = (9, 0) if INTERPRETED else torch.cuda.get_device_capability(device)
    tiles = TILES[_TABLE_OF[capability], dtype]
    return tiles[min(size for size in tiles if size >= features)]


def splits_of(keys: int, features: int) -> int:
    """Most parts of a queue, from K and D alone: a row's result must not depend on how many rows there are.

    A part costs its sums' traffic, B x D float32 written and read, and that must stay small beside its keys' products.
    """
    return min(ceil_div(keys, 2048 if features > 256 else 4096), MAX_SPLITS)


def keys_per_split(keys: int, splits: int, block: int) -> int:
    """Keys of one part: whole turns of the loop, at least 8."""
    return max(ceil_div(ceil_div(keys, splits), block), 8) * block


def padded(features: int) -> int:
    """D as a tile has it: a power of two, at least what a tensor core multiplies."""
    return max(1 << (features - 1).bit_length(), 16)


def ceil_div(a: int, b: int) -> int:
    """A / b, rounded up."""
    return -(-a // b)


def options(tile: Tile, features: int, mask: int, dtype: torch.dtype) -> dict[str, int | bool]:
    """The compile-time arguments that all kernels with products share."""
    return {
        "D": features,
        "MASK": mask,
        "ROWS": tile.rows,
        "KEYS": tile.keys,
        "BLOCK_D": padded(features),
        "STEP": min(tile.step, padded(features)),
        "SPREAD": tile.spread,
        "EMU": INTERPRETED and dtype == torch.bfloat16,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }
