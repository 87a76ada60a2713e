"""Contrast between images and one text feature of each identity, or texts and one image feature.

Shape suffixes: B rows of this rank, D feature size, C identities.
"""

import torch
from torch import Tensor

from reid_dist.losses.contrastive import normalize, product_contrast, widened
from reid_dist.losses.identity import identity_loss


def identity_text_contrast(image_BD: Tensor, text_BD: Tensor, pid_B: Tensor, log_scale: Tensor | None = None) -> Tensor:
    """L_i2t + L_t2i of CLIP-ReID's first stage (Li, Sun & Li, AAAI 2023, eq. 3-5), over the global batch.

    L_i2t = -1/G sum_i 1/|P(i)| sum_{p in P(i)} log [ exp(s(v_i, t_p)) / sum_a exp(s(v_i, t_a)) ], P(i) the rows of the
    identity of i; L_t2i with the roles swapped. s is the plain product of the features, as the paper and its code have
    it, or with `log_scale` the cosine times exp(log_scale). An identity's text counts once for each of its images.

    Args:
        image_BD: Shape: (B, D).
        text_BD: text feature of each row's identity. Shape: (B, D).
        pid_B: identities, int64 below 2^31. Shape: (B,).
        log_scale: natural log of the inverse temperature; None: plain products. Shape: () or (1,).

    Returns:
        Scalar; its mean over ranks is the loss of the global batch.
    """
    with torch.autocast(image_BD.device.type, enabled=False):
        image_BD, text_BD, log_scale = _sides(image_BD, text_BD, log_scale)
        return 2 * product_contrast(image_BD, text_BD, log_scale, pid_B)


def all_identities_contrast(
    image_BD: Tensor, text_CD: Tensor, label_B: Tensor, log_scale: Tensor | None = None, smoothing: float = 0.1
) -> Tensor:
    """L_i2tce of CLIP-ReID's second stage (Li, Sun & Li, AAAI 2023, eq. 8): images against ALL identities' texts.

    -1/G sum_i sum_c q_ic log [ exp(s(v_i, t_c)) / sum_a exp(s(v_i, t_a)) ] with q_ic = (1 - eps) 1[c = y_i] + eps / C
    and s as in `identity_text_contrast`. HPL's L_cic (AAAI 2026) is the same without smoothing. With the roles swapped,
    captions against the mean image features of the identities, it is one form of the text stage's identity loss
    (methods.md 1.4).

    Args:
        image_BD: Shape: (B, D).
        text_CD: text feature of each identity; a constant in both papers. Shape: (C, D).
        label_B: identity labels 0..C-1. Shape: (B,).
        log_scale: as above.
        smoothing: eps.

    Returns:
        Scalar; its mean over ranks is the loss of the global batch.
    """
    with torch.autocast(image_BD.device.type, enabled=False):
        image_BD, text_CD, log_scale = _sides(image_BD, text_CD, log_scale)
        return identity_loss(log_scale.exp() * (image_BD @ text_CD.T), label_B, smoothing)


def _sides(image_BD: Tensor, text_CD: Tensor, log_scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Both sides and the scale of which products are the similarities."""
    if log_scale is None:
        return widened(image_BD), widened(text_CD), torch.zeros((), device=image_BD.device)
    return normalize(image_BD), normalize(text_CD), log_scale
