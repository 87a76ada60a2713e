"""Where the triton kernels run, what they say where they do not, and how they share out the keys; without triton."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reid_dist.kernels import triton_tiles
from reid_dist.kernels.contrastive import queue_attend
from reid_dist.kernels.triton_tiles import TILES, ceil_div, keys_per_split, padded, splits_of, tile_of, why_unsupported

ROOT = Path(__file__).parents[2]
CPU, BF16 = torch.device("cpu"), torch.bfloat16


def test_asked_for_by_name_on_the_cpu_it_says_what_to_do() -> None:
    x, ids = torch.ones(2, 4), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"backend 'triton'.* CUDA device.*'chunked'"):
        queue_attend(x, x, ids, ids, torch.zeros(()), backend="triton")


@pytest.mark.parametrize(
    ("features", "dtype", "text"),
    [(513, BF16, "512 features, not 513"), (64, torch.float16, "torch.float16"), (64, torch.float64, "torch.float64")],
)
def test_what_has_no_tile_is_refused(
    monkeypatch: pytest.MonkeyPatch, features: int, dtype: torch.dtype, text: str
) -> None:
    monkeypatch.setattr(triton_tiles, "INTERPRETED", True)
    assert why_unsupported(CPU, 512, BF16) is None
    with pytest.raises(ValueError, match=text):
        tile_of(CPU, features, dtype)


def test_an_unknown_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "compute capability 7.5" in str(why_unsupported(torch.device("cuda"), 64, BF16))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert why_unsupported(torch.device("cuda"), 64, BF16) is None


def test_features_take_the_next_larger_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_tiles, "INTERPRETED", True)
    for features, expected in ((1, 64), (64, 64), (65, 128), (257, 512), (512, 512)):
        assert tile_of(CPU, features, BF16) == TILES[90, BF16][expected]


def test_splits_cover_the_keys_in_whole_turns() -> None:
    for keys in (1, 2, 63, 64, 65, 4097, 65536, 65537, 1_000_003):
        for features in (64, 512):
            for block in (16, 32, 64):
                per_split = keys_per_split(keys, splits_of(keys, features), block)
                assert per_split % block == 0
                assert 1 <= ceil_div(keys, per_split) <= triton_tiles.MAX_SPLITS


def test_padded_is_the_next_power_of_two() -> None:
    assert [padded(n) for n in (1, 16, 17, 64, 65, 512)] == [16, 16, 32, 64, 128, 512]


def test_the_kernels_are_imported_without_triton() -> None:
    """A machine without triton has the other backends, and is told so when it asks for this one."""
    program = (
        "import importlib.util, sys; sys.modules['triton'] = None; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
        "import torch, reid_dist.kernels.contrastive\n"
        "from reid_dist.kernels.triton_tiles import why_unsupported\n"
        "print(why_unsupported(torch.device('cpu'), 64, torch.bfloat16))"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "triton is not installed" in run.stdout
