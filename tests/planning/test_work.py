"""Operations counted for a plan: beside torch's own counter, by hand, and as time."""

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from reid_dist.config import RunConfig
from reid_dist.kernels.checks import MASKS
from reid_dist.kernels.contrastive import queue_attend
from reid_dist.kernels.operators import pair_statistics
from reid_dist.planning.assumptions import Assumptions
from reid_dist.planning.building import stage_without_memory
from reid_dist.planning.work import Work
from reid_dist.recipe_file import load_config

CONFIGS = Path(__file__).parents[2] / "configs"


def counted(config: RunConfig, index: int, rows: int) -> tuple[Work, int]:
    """Our count of a forward and backward, and torch's FLOPs."""
    torchs = FlopCounterMode(display=False)
    with stage_without_memory(config, config.stages[index], rows) as (module, batch), torchs, Work() as work:
        module(batch)["loss"].backward()
    return work, torchs.get_total_flops()


@pytest.mark.parametrize(("recipe", "index"), [("quickstart", 0), ("quickstart", 1), ("unified_vit_b16", 1)])
def test_flops_are_those_of_torchs_counter(recipe: str, index: int) -> None:
    config = load_config(CONFIGS / f"{recipe}.yaml", ["data.root=/nowhere"])
    work, expected = counted(config, index, 4)
    # Torch does not know our operators.
    assert expected <= work.flops < 1.01 * expected


def test_a_vit_multiplies_what_its_shapes_say() -> None:
    """Forward and backward of matrix products: 6 FLOPs a weight and token."""
    config = load_config(CONFIGS / "unified_vit_b16.yaml", ["data.root=/nowhere"])
    work, _ = counted(config, 1, 4)
    tokens, blocks = 4 * (24 * 8 + 1), 12 * 12 * 768**2
    assert work.flops == pytest.approx(6 * tokens * blocks, rel=0.07)  # attention itself and the patches beside


def test_our_operators_count_their_products() -> None:
    anchors_BD, keys_KD = torch.randn(6, 16, requires_grad=True), torch.randn(100, 16)
    ids_B, ids_K = torch.arange(6, dtype=torch.int32), torch.arange(100, dtype=torch.int32)
    with Work() as work:
        queue_attend(anchors_BD, keys_KD, ids_B, ids_K, torch.tensor(1.0), mask="identity")
    assert work.flops == 2 * 2 * 6 * 100 * 16
    with Work() as work:
        rows_SB, columns_SG = pair_statistics(
            anchors_BD, keys_KD, ids_B, ids_K, torch.tensor(1.0), MASKS.index("identity"), False, "chunked"
        )
        (rows_SB.sum() + columns_SG.sum()).backward()
    assert work.flops == (1 + 3) * 2 * 6 * 100 * 16


def test_bytes_by_hand_and_views_are_free() -> None:
    with FakeTensorMode():
        x = torch.empty(1000)
        with Work() as work:
            x[10:].view(-1, 10).t()
            torch.empty(5000)
            assert (work.count, work.moved_bytes) == (0, 0)
            y = x + 1
            y.mul_(x)
            x[:1].expand(1000) + y
    assert work.count == 3
    assert work.moved_bytes == 2 * 4000 + 3 * 4000 + (4000 + 4000 + 4000)  # a view's storage is read whole at most


def test_time_is_the_longest_of_products_bytes_and_launch() -> None:
    assumed = Assumptions(bf16_tflops=8, fp32_tflops=1, memory_gbs=10, utilisation=0.5, operation_us=100)
    work = Work()
    work.operations.update({(10**12, 0, False): 1, (10**12, 0, True): 2, (0, 10**10, False): 1, (1, 1, False): 3})
    assert work.seconds(assumed) == pytest.approx(2 + 2 * 0.25 + 2 + 3e-4)
