"""Ahead-of-time compilation of the triton kernels, without a GPU: every tile of the table, on every architecture.

    python -m pytest tests/kernels/test_triton_compiled.py -q -s     # with a table of registers and shared memory

Compiled kernels are kept in triton's cache (TRITON_CACHE_DIR), so that a second run is quick.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from reid_dist.kernels import triton_tiles
from reid_dist.kernels.triton_tiles import TILES, Tile

triton = pytest.importorskip("triton", reason="triton is not installed: its kernels are for CUDA machines")
if triton_tiles.INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set: kernels are not compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from reid_dist.kernels import contrastive_triton as kernels  # noqa: E402

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Most shared memory of one block (CUDA programming guide, technical specifications per compute capability)."""
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


class Compiled(NamedTuple):
    """What a kernel needs of the machine."""

    registers: int
    stack_bytes: int
    """Registers that did not fit, spilled to memory."""
    shared_bytes: int
    ptx: str


def compile_for(
    kernel: str, architecture: int, dtype: torch.dtype, features: int, tile: Tile, mask: int = 0
) -> Compiled:
    """Compiles as a launch would, with 16-byte aligned tensors, by the ptxas of triton's wheel."""
    function = getattr(kernels, kernel)
    constants = triton_tiles.options(tile, features, mask, dtype)
    launch = {name: constants.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    if kernel == "combine":
        constants = {"D": features, "ROWS": 4, "BLOCK_D": triton_tiles.padded(features)}
        launch = {"num_warps": 4, "enable_fp_fusion": True}
    signature = {name: _type_of(name, dtype) for name in function.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if signature[name].startswith("*")
    }
    source = ASTSource(function, signature, constants, aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch)
    registers, stack_bytes = _resources(binary.asm["cubin"])
    return Compiled(registers, stack_bytes, binary.metadata.shared, binary.asm["ptx"])


def _type_of(name: str, dtype: torch.dtype) -> str:
    if name in ("anchor_ptr", "key_ptr", "row_ptr", "column_ptr"):
        return f"*{TYPES[dtype]}"
    if name.endswith("id_ptr"):
        return "*i32"
    if name == "lse_ptr":
        return "*fp64"
    return "*fp32" if name.endswith("_ptr") else "i32"


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of the only kernel of a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [BINARIES / "cuobjdump", "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert match is not None, text
    return int(match[1]), int(match[2])


def _table() -> list:
    rows = []
    for (architecture, dtype), tiles in TILES.items():
        for features, tile in tiles.items():
            # float32 has one set of tiles: each is compiled on sm_90, and the one that needs most everywhere.
            if dtype == torch.float32 and architecture != 90 and features != max(tiles):
                continue
            # Quick are the tile that training takes, on its architecture, and a float32 one.
            quick = (architecture, dtype, features) in ((90, torch.bfloat16, 512), (90, torch.float32, 64))
            marks = [] if quick else [pytest.mark.slow]
            identity = f"sm_{architecture}-{TYPES[dtype]}-{features}"
            rows.append(pytest.param(architecture, dtype, features, tile, id=identity, marks=marks))
    return rows


@pytest.mark.parametrize(("architecture", "dtype", "features", "tile"), _table())
def test_tiles_fit(architecture: int, dtype: torch.dtype, features: int, tile: Tile) -> None:
    for kernel in ("attend", "statistics", "gradient"):
        found = compile_for(kernel, architecture, dtype, features, tile)
        where = f"sm_{architecture} {TYPES[dtype]} D={features} {kernel}: {tuple(tile)}"
        print(f"\n{where} -> {found.registers} registers, {found.shared_bytes >> 10} KiB", end="", file=sys.stderr)
        assert found.stack_bytes == 0
        assert found.shared_bytes <= SHARED_BYTES[architecture]
        assert found.registers * 32 * tile.warps <= 65536
        if dtype == torch.bfloat16:
            assert TENSOR_CORES[architecture] in found.ptx


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("features", [256, 512])
@pytest.mark.parametrize("mask", [1, 2])
def test_tiles_fit_with_the_other_masks(architecture: int, features: int, mask: int) -> None:
    found = compile_for(
        "attend", architecture, torch.bfloat16, features, TILES[architecture, torch.bfloat16][features], mask
    )
    assert found.stack_bytes == 0
    assert found.shared_bytes <= SHARED_BYTES[architecture]


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_combine_fits(architecture: int) -> None:
    found = compile_for("combine", architecture, torch.bfloat16, 512, TILES[architecture, torch.bfloat16][512])
    assert found.stack_bytes == 0


def test_odd_features_fit() -> None:
    """D that no power of two is: loads are masked in both directions, and cost more registers."""
    found = compile_for("attend", 90, torch.bfloat16, 384, TILES[90, torch.bfloat16][512])
    assert found.stack_bytes == 0


def test_no_warp_repeats_another_ones_work() -> None:
    """The reason for `Tile.spread`: of the first product at D = 512, every warp multiplies its own part."""
    tile = TILES[90, torch.bfloat16][512]
    products = [
        compile_for("attend", 90, torch.bfloat16, 512, tile._replace(spread=spread, keys=32)).ptx.count(
            "wgmma.mma_async"
        )
        for spread in (False, True)
    ]
    first_product, second_product = 512 // 16, 32 // 16
    assert products[1] == first_product + second_product
    assert products[0] > products[1]
