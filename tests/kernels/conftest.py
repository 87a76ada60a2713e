"""Inputs of kernel tests and what they are measured with.

Shape suffixes: B anchors (rows), K keys, G columns, D features.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reid_dist.kernels import chunked, chunked_pairs


class QueueCase(NamedTuple):
    """The arguments of moco_nce, in order; without positives, of queue_attend."""

    anchors_BD: Tensor
    positives_BD: Tensor
    keys_KD: Tensor
    anchor_ids_B: Tensor
    key_ids_K: Tensor
    log_scale: Tensor

    def double(self) -> "QueueCase":
        return QueueCase(*(x.double() if x.is_floating_point() else x for x in self))

    def leaves(self) -> "QueueCase":
        """The same with fresh anchors and scale that want gradients."""
        return self._replace(
            anchors_BD=self.anchors_BD.detach().clone().requires_grad_(),
            log_scale=self.log_scale.detach().clone().requires_grad_(),
        )

    def attend(self) -> tuple[Tensor, ...]:
        return (self.anchors_BD, *self[2:])


def make_queue_case(
    rows: int = 7,
    keys: int = 33,
    features: int = 16,
    *,
    dtype: torch.dtype = torch.float32,
    temperature: float = 0.07,
    people: int = 9,
    empty: float = 0.1,
    random: float = 0.1,
    near: float = 0.5,
    norm: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
) -> QueueCase:
    """Random unit features; every person's keys and anchors share a direction, as in training.

    Args:
        people: identities that anchors and keys are drawn from.
        empty: share of EMPTY slots.
        random: share of RANDOM slots.
        near: how far a feature is its person's direction: 0 random, 1 all equal.
        norm: of every feature.
    """
    generator = torch.Generator().manual_seed(seed)
    centre_PD = torch.randn(people, features, generator=generator, dtype=torch.float64)

    def draw(ids: Tensor) -> Tensor:
        noise = torch.randn(ids.shape[0], features, generator=generator, dtype=torch.float64)
        x = near * centre_PD[ids.clamp(min=0).long()] + (1 - near) * noise
        return (norm * F.normalize(x, dim=1)).to(dtype).to(device)

    anchor_ids_B = torch.randint(people, (rows,), generator=generator, dtype=torch.int32)
    key_ids_K = torch.randint(people, (keys,), generator=generator, dtype=torch.int32)
    lot_K = torch.rand(keys, generator=generator)
    key_ids_K[lot_K < empty + random] = -2
    key_ids_K[lot_K < empty] = -1
    log_scale = torch.tensor(-torch.tensor(temperature).log().item(), dtype=torch.float32)
    return QueueCase(
        draw(anchor_ids_B),
        draw(anchor_ids_B),
        draw(key_ids_K),
        anchor_ids_B.to(device),
        key_ids_K.to(device),
        log_scale.to(torch.float64 if dtype == torch.float64 else torch.float32).to(device),
    )


@pytest.fixture(scope="session")
def queue_case() -> Callable[..., QueueCase]:
    """`queue_case(rows, keys, features, ...)`: see `make_queue_case`."""
    return make_queue_case


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The CPU, and a CUDA device where there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of odd sizes, far below those of tests: every loop turns several times and ends with a ragged tile."""
    monkeypatch.setattr(chunked, "_CPU_ROWS", 5)
    monkeypatch.setattr(chunked, "_GPU_ROWS", 5)
    monkeypatch.setattr(chunked, "_chunk_width", lambda *_: 7)
    monkeypatch.setattr(chunked_pairs, "_CPU_TILE", (5, 7))
    monkeypatch.setattr(chunked_pairs, "_GPU_TILE", (5, 7))


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """||x - reference|| / ||reference|| in float64."""

    def measure(x: Tensor, reference: Tensor) -> float:
        x, reference = x.detach().double(), reference.detach().double()
        return float((x - reference).norm() / reference.norm())

    return measure
