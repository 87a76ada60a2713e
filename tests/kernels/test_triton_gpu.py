"""The triton kernels compiled, on a GPU: the interpreter's cases, and what only a GPU can show.

python -m pytest tests/kernels/test_triton_gpu.py -q -m gpu
"""

from collections.abc import Iterator

import pytest
import torch

from reid_dist.kernels.contrastive import moco_nce, queue_attend_with_mean
from reid_dist.kernels.triton_tiles import why_unsupported
from tests.kernels.triton_cases import BF16, CASES, FLOAT, PROPERTIES, Case, beyond_gate, broken, inputs, measure, run

_WHY_NOT = (
    why_unsupported(torch.device("cuda"), 64, FLOAT) if torch.cuda.is_available() else "needs a CUDA device, none here"
)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_WHY_NOT is not None, reason=str(_WHY_NOT))]


@pytest.fixture(autouse=True)
def _exact_reference() -> Iterator[None]:
    """Plain torch multiplies float32 as float32 here: TF32 would make its errors no measure of ours."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", CASES)
def test_equals_float64(name: str) -> None:
    assert beyond_gate(CASES[name], measure(CASES[name], "cuda")) == []


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name: str) -> None:
    assert broken(name, "cuda") is None


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
@pytest.mark.parametrize("features", [64, 128, 256, 512])
@pytest.mark.parametrize("op", ["queue", "pair", "nce"])
def test_many_tiles_equal_float64(op: str, features: int, dtype: torch.dtype) -> None:
    """Sizes at which several blocks and splits run at once, ragged in every direction."""
    case = Case(op, 333, 1501 if op == "pair" else 20011, features, dtype, temperature=0.05)
    assert beyond_gate(case, measure(case, "cuda")) == []


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
@pytest.mark.parametrize("op", ["queue", "pair"])
def test_repeats_bit_by_bit(op: str, dtype: torch.dtype) -> None:
    case = Case(op, 700, 3001 if op == "pair" else 30011, 256, dtype)
    x = inputs(case, "cuda")
    first = run(case, x, "triton")
    for _ in range(20):
        for name, found in run(case, x, "triton").items():
            assert torch.equal(found, first[name]), name


def test_never_waits_for_the_gpu() -> None:
    case = Case("nce", 64, 5000, 128, BF16)
    x = inputs(case, "cuda")
    arguments = (x.positives, x.keys, x.anchor_ids, x.key_ids, x.log_scale.requires_grad_())
    anchors = x.anchors.requires_grad_()
    moco_nce(anchors, *arguments, backend="triton").mean().backward()  # compiles
    first_BD = anchors.grad
    anchors.grad = None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            anchors.sum().item()  # waits, and the mode says so
        moco_nce(anchors, *arguments, backend="triton").mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(anchors.grad, first_BD)


@pytest.mark.parametrize(("rows", "keys"), [(4096, 1 << 20), (4096, 1 << 16), (1024, 1 << 20)])
def test_memory_is_linear_in_rows_and_flat_in_keys(rows: int, keys: int) -> None:
    """At most 64 MB beside the inputs, the result's included, at B = 4096 and D = 512 (full logits: 16 GiB)."""
    features = 512
    keys_KD = torch.randn(keys, features, dtype=torch.bfloat16, device="cuda")
    anchors_BD = torch.randn(rows, features, dtype=torch.bfloat16, device="cuda")
    anchor_ids_B = torch.arange(rows, dtype=torch.int32, device="cuda")
    key_ids_K = torch.arange(keys, dtype=torch.int32, device="cuda") % (2 * rows)
    log_scale = torch.zeros((), device="cuda") - 2.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    lse_B, mean_BD = queue_attend_with_mean(
        anchors_BD, keys_KD, anchor_ids_B, key_ids_K, log_scale, mask="identity", backend="triton"
    )
    extra = torch.cuda.max_memory_allocated() - before
    assert lse_B.isfinite().all()
    assert mean_BD.isfinite().all()
    assert extra <= 64e6, f"{extra / 1e6:.1f} MB"
