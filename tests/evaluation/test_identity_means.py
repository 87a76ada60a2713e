"""Mean image features of training identities, against a loop over the images."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from reid_dist.data.reader import ShardSet
from reid_dist.data.tokenizer import WordTokenizer
from reid_dist.data.training_samples import TrainingSamples
from reid_dist.data.transforms import Augment
from reid_dist.evaluation.identity_means import identity_means

SIZE = (32, 16)
WEIGHT = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))


class Projection(nn.Module):
    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        return (image_BCHW.float().mean((2, 3)) / 255 - 0.4) @ WEIGHT

    def encode_text(self, token_BL: Tensor) -> Tensor:
        raise AssertionError("no captions are asked for")


def samples_of(world: Path) -> TrainingSamples:
    """Two sets, one of whose images are items once for each caption, and all of which would be augmented."""
    sets = [ShardSet(world / "market1501"), ShardSet(world / "cuhk_pedes")]
    tokenizer = WordTokenizer(["a"], 8, 16)
    augment = Augment(flip=0.5, pad=4, erase=1.0)
    return TrainingSamples(sets, SIZE, tokenizer, augment, allow_uncaptioned=True, items="captions")


def expected(samples: TrainingSamples) -> Tensor:
    images: dict[int, set[tuple[int, int]]] = {}
    for place, pid in enumerate(samples.pid_N.tolist()):
        images.setdefault(pid, set()).add((int(samples.set_N[place]), int(samples.row_N[place])))
    means = []
    for pid in range(len(samples.identities)):
        found = []
        for number, row in sorted(images[pid]):
            pixels = torch.from_numpy(samples.images[number](row)).double().mean((0, 1)) / 255 - 0.4
            found.append(nn.functional.normalize(pixels @ WEIGHT.double(), dim=0))
        means.append(nn.functional.normalize(torch.stack(found).mean(0), dim=0))
    return torch.stack(means)


def test_every_image_counts_once_and_as_it_is(tiny_world: Path) -> None:
    samples = samples_of(tiny_world)
    assert len(samples) > len(set(zip(samples.set_N.tolist(), samples.row_N.tolist(), strict=True)))
    found = identity_means(Projection(), samples, batch_size=7)
    assert found.dtype == torch.float32 and found.shape == (len(samples.identities), 5)
    torch.testing.assert_close(found.double(), expected(samples), rtol=1e-5, atol=1e-6)


def _means(world: Path, batch_size: int) -> Tensor:
    return identity_means(Projection(), samples_of(world), batch_size)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_get_the_same_to_the_bit(tiny_world: Path, run_ranks: Callable, ranks: int) -> None:
    alone = _means(tiny_world, 8)
    for found in run_ranks(ranks, _means, tiny_world, 8):
        assert torch.equal(found, alone)
