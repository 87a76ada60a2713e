"""Whether the ranks still hold the same of what must be equal: memory and networks fail without a word.

Compared are the tensors that every rank keeps whole for itself: weights (under ZeRO 3 and FSDP2 each element has one
owner, and nothing can differ), buffers, momentum encoder and queue. BatchNorm's running statistics are the ranks' own.

Under ZeRO 1 and 2 a rank's weights are sent anew with every step by the ranks that own their masters: what differs on
one rank is gone after the next step, and found only by a comparison before it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase

from reid_dist.digest import digest
from reid_dist.distributed import all_gather, who_differs
from reid_dist.errors import DivergenceError
from reid_dist.stages import Stage

_NAMED = 3


def check_ranks_agree(stage: Stage, step: int) -> None:
    """Compares a digest of every tensor over the ranks; one gather of 8 bytes for each, and a wait for the device.

    Called by the trainer on every rank after `stage.after_step` of steps with (step + 1) % supervision.desync_every
    == 0 (0: never), and where it is not 0 also before each save, so that no checkpoint mixes two models.

    Args:
        stage: of the engine.
        step: 0-based, for the message.

    Raises:
        DivergenceError: on every rank alike, naming tensors and ranks.
    """
    found = list(_digests(stage))
    table = all_gather(torch.stack([value for _, value in found])[None]).tolist()
    differing = [
        (name, values) for (name, _), *values in zip(found, *table, strict=True) if any(x != values[0] for x in values)
    ]
    if differing:
        named = "; ".join(f"{name}: {who_differs(values)}" for name, values in differing[:_NAMED])
        more = f"; and {len(differing) - _NAMED} more tensors" if len(differing) > _NAMED else ""
        raise DivergenceError(
            f"step {step + 1}: not the same on all ranks: {named}{more}; continue from the last checkpoint"
        )


@torch.no_grad()
def _digests(stage: Stage) -> Iterator[tuple[str, Tensor]]:
    """int64 of each tensor that all ranks hold, in an order that they keep, named for a person."""
    own = _own_statistics(stage)
    for name, tensor in (*stage.named_parameters(), *stage.named_buffers()):
        if name not in own and _is_whole(tensor):
            yield name, digest([tensor], tensor.device)
    if stage.moco is not None:
        for name, tensor in stage.moco.key_encoder.state().items():
            if name not in own:
                yield f"momentum encoder, {name}", digest([tensor], tensor.device)
        yield "feature queue", stage.moco.queue.agreed()
    if stage.sharded is not None:
        yield "steps of the class centres", torch.tensor(stage.sharded.steps, device=stage.sharded.weight_SD.device)


def _own_statistics(stage: Stage) -> set[str]:
    layers = {name: layer for name, layer in stage.named_modules() if isinstance(layer, _NormBase)}
    return {f"{prefix}.{name}" for prefix, layer in layers.items() for name, _ in layer.named_buffers()}


def _is_whole(tensor: Tensor) -> bool:
    """Not so where an engine has cut it: FSDP2's type, or the attribute that ZeRO 3 gives a parameter."""
    return not isinstance(tensor, DTensor) and not hasattr(tensor, "ds_tensor")
