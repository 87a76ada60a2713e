"""How far two losses pull the vision encoder in different directions: cosines of their gradients, block by block."""

import torch
from torch import Tensor, nn

from reid_dist.distributed import sum_over_ranks


def gradient_cosines(tower: nn.Module, one: Tensor, other: Tensor) -> dict[str, Tensor]:
    """Cosine between the gradients of two losses of the global batch, for each block of a tower and for all of it.

    1 where both want the same change, negative where one undoes the other. Leaves the graph and `.grad` as they are.
    Collective.

    Args:
        tower: whose parameters are asked; those that do not train are left out.
        one: a loss of this rank, as all losses here: its mean over ranks counts. Shape: ().
        other: another. Shape: ().

    Returns:
        "conflict/all" and "conflict/<block>": float64, shape (); 0 where a loss does not reach a block.
    """
    named = [(name, parameter) for name, parameter in tower.named_parameters() if parameter.requires_grad]
    parameters = [parameter for _, parameter in named]
    gradients = [
        torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True) for loss in (one, other)
    ]
    products: dict[str, Tensor] = {}
    for (name, _), a, b in zip(named, *gradients, strict=True):
        # The scale of a sum over ranks does not matter to a cosine.
        x, y = sum_over_ranks(a.double()), sum_over_ranks(b.double())
        three = torch.stack([(x * y).sum(), (x * x).sum(), (y * y).sum()])
        for block in ("all", block_of(name)):
            products[block] = products[block] + three if block in products else three
    return {f"conflict/{block}": _cosine(*three) for block, three in products.items()}


def block_of(name: str) -> str:
    """The block that a parameter belongs to: its name up to the first number, else the first part.

    `transformer.resblocks.3.attn.in_proj_weight` is of `transformer.resblocks.3`, `conv1.weight` of `conv1`.
    """
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1] if numbers else parts[:1])


def _cosine(product: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return product / (one * other).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
