"""Identity loss over classes whose weights are spread over the ranks, all of them or a sample.

Partial FC (An et al., "Killing Two Birds With One Stone", CVPR 2022, section 3): every rank multiplies the features of
ALL ranks with the class centres that it holds, and the softmax is put together from the ranks' maxima and sums. Sent
are features, their gradients and five numbers for each row and rank; never logits or centres.

Shape suffixes: B rows of this rank, W ranks, G = W x B rows of all ranks, D feature size, S classes that are counted
here, X numbers of a row.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from reid_dist.distributed import all_gather, all_gather_with_grad, rank, world_size


def sharded_identity_loss(
    feature_BD: Tensor, label_B: Tensor, weight_SD: Tensor, class_S: Tensor, smoothing: float = 0.1
) -> Tensor:
    """`losses.identity.identity_loss` of the linear classifier whose rows the ranks hold together; a collective.

    With A the classes that some rank counts: l_i = -sum_{c in A} q_ic log(exp z_ic / sum_{k in A} exp z_ik) with
    z_ic = f_i . w_c and q_ic = (1 - eps) 1[c = y_i] + eps / |A|. With all classes in A that is the dense loss; with a
    sample it is the dense loss of a problem that has these classes only, smoothing included (published without
    smoothing).

    The gradient of the weights stays here, as of the SUM over ranks of what they return: divide it by the number of
    ranks where losses are means over ranks. That of the features is as of `all_gather_with_grad`.

    Args:
        feature_BD: differentiable; as many rows on every rank. Shape: (B, D).
        label_B: classes, counted on exactly one rank each. Shape: (B,).
        weight_SD: centres of the classes counted here, fp32 at least; differentiable. Shape: (S, D), S may be 0.
        class_S: which classes they are, ascending. Shape: (S,).
        smoothing: eps.

    Returns:
        Scalar, the mean over this rank's rows; inf when a label is counted nowhere.
    """
    with torch.autocast(feature_BD.device.type, enabled=False):
        exact = torch.promote_types(feature_BD.dtype, weight_SD.dtype)  # float64 in reference tests
        feature_GD = all_gather_with_grad(feature_BD.to(exact))
        loss_B: Tensor = _Rows.apply(feature_GD, weight_SD.to(exact), all_gather(label_B), class_S, smoothing)
        return loss_B.mean()


class _Rows(torch.autograd.Function):
    """Losses of this rank's rows. One (G, S) buffer is logits, then exponentials, then what the backward needs."""

    @staticmethod
    def forward(
        ctx: Any, feature_GD: Tensor, weight_SD: Tensor, label_G: Tensor, class_S: Tensor, smoothing: float
    ) -> Tensor:
        buffer_GS = feature_GD @ weight_SD.T
        place_G, here_G = _columns(label_G, class_S)
        part_GX = _exponentiate(buffer_GS, place_G, here_G)
        # In float64 from here: G numbers, whose rounding would be that of every probability.
        largest_WG, sum_WG, target_WG, logits_WG, count_WG = _of_all_ranks(part_GX).double().unbind(-1)
        largest_G, target_G, count = largest_WG.amax(dim=0), target_WG.amax(dim=0), count_WG[:, 0].sum()
        total_G = (sum_WG * (largest_WG - largest_G).exp()).sum(dim=0)
        spread = smoothing / count
        loss_G = largest_G + total_G.log() - (1 - smoothing) * target_G - spread * logits_WG.sum(dim=0)
        if any(ctx.needs_input_grad):
            factor_G = (part_GX[:, 0].double() - largest_G).exp() / total_G
            # Probabilities minus targets.
            buffer_GS.mul_(factor_G.to(buffer_GS.dtype)[:, None]).sub_(spread.to(buffer_GS.dtype))
            _subtract_at(buffer_GS, place_G, here_G, 1 - smoothing)
            ctx.save_for_backward(feature_GD, buffer_GS)
            ctx.weight_SD = weight_SD  # not saved: no activation, and who plans memory counts it already
        return _own(loss_G).to(feature_GD.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        feature_GD, error_GS = ctx.saved_tensors
        with torch.autocast(feature_GD.device.type, enabled=False):
            upstream_G1 = all_gather(gradients[0])[:, None]
            feature_gradient_GD = upstream_G1 * (error_GS @ ctx.weight_SD)
            weight_gradient_SD = error_GS.T @ (upstream_G1 * feature_GD) if ctx.needs_input_grad[1] else None
        return feature_gradient_GD, weight_gradient_SD, None, None, None


def _columns(label_G: Tensor, class_S: Tensor) -> tuple[Tensor, Tensor]:
    """Where the labels are among the classes, and whether they are there at all. Shapes: (G,), (G,)."""
    place_G = torch.searchsorted(class_S, label_G)
    here_G = F.pad(class_S, (0, 1), value=-1)[place_G] == label_G
    return place_G.clamp(max=max(0, class_S.shape[0] - 1)), here_G


def _exponentiate(logits_GS: Tensor, place_G: Tensor, here_G: Tensor) -> Tensor:
    """Replaces logits by exp(logit - largest of the row).

    Returns:
        Of each row: largest logit, sum of the exponentials, logit of its own class (-inf elsewhere), sum of the logits,
        number of classes. Shape: (G, X).
    """
    classes = logits_GS.shape[1]
    if classes == 0:
        return logits_GS.new_tensor([-torch.inf, 0, -torch.inf, 0, 0]).expand(logits_GS.shape[0], -1)
    target_G = logits_GS.gather(1, place_G[:, None])[:, 0].masked_fill(~here_G, -torch.inf)
    total_G, largest_G = logits_GS.sum(dim=1), logits_GS.amax(dim=1)
    sum_G = logits_GS.sub_(largest_G[:, None]).exp_().sum(dim=1)
    return torch.stack([largest_G, sum_G, target_G, total_G, torch.full_like(sum_G, classes)], dim=1)


def _of_all_ranks(part_GX: Tensor) -> Tensor:
    """Shape: (G, X) -> (W, G, X)."""
    return all_gather(part_GX.contiguous()[None])


def _subtract_at(x_GS: Tensor, place_G: Tensor, here_G: Tensor, amount: float) -> None:
    if x_GS.shape[1]:
        x_GS.scatter_add_(1, place_G[:, None], -amount * here_G.to(x_GS.dtype)[:, None])


def _own(x_G: Tensor) -> Tensor:
    """This rank's rows. Shape: (G,) -> (B,)."""
    rows = x_G.shape[0] // world_size()
    return x_G[rank() * rows : (rank() + 1) * rows]
