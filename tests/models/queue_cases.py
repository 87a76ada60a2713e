"""Random rows for queues of tests, and the bytes that a queue holds."""

import hashlib

import torch
from torch import Tensor

from reid_dist.models.queue import FeatureQueue, PendingKeys

D = 5


def make_rows(count: int, seed: int, identities: int = 7, features: int = D) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, count, features, generator=generator, dtype=torch.float64)
    return image, text, torch.randint(identities, (count,), generator=generator)


def push(queue: FeatureQueue, rows: tuple[Tensor, Tensor, Tensor]) -> PendingKeys:
    pending = queue.gather(*rows)
    queue.commit([pending])
    return pending


def raw_sha(queue: FeatureQueue) -> str:
    ring = queue.ring
    parts = (ring.image_XD, ring.text_XD, ring.ids_X, ring.sequence_X)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part[: ring.slots].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest() + str(int(ring.next))
