"""Closed-form learners and chance: what a trained network has to beat, without a single gradient step.

The raw colour histogram is far too weak a floor; the learners that count are the histogram whitened within
the training identities (I2I) and the ridge regression from histogram to caption words (T2I).
All algebra is fp64.

Shape suffixes: N images, H height, W width, C channels, D feature, V vocabulary, M captions.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from reid_dist.errors import UserError
from reid_dist.evaluation.chance import chance_metrics
from reid_dist.evaluation.ranking import Metrics, i2i_metrics, t2i_metrics

STRIPES = 8
LEVELS = 4  # per colour channel, hence 64 bins per stripe
IMAGES_AT_A_TIME = 256
Pair = dict[str, Metrics | None]


@dataclass(frozen=True)
class ImageSet:
    """Images of one role with their labels.

    Attributes:
        image_NHWC: uint8 RGB.
        pid_N: int64 identities, comparable only within one data set.
        camid_N: int64 cameras, -1 = unknown.
        captions: per image its captions; empty lists where there are none.
    """

    image_NHWC: Tensor
    pid_N: Tensor
    camid_N: Tensor
    captions: Sequence[Sequence[str]]

    def texts(self) -> tuple[list[str], Tensor]:
        """Every caption with the identity of its image: the T2I queries."""
        counts = torch.tensor([len(texts) for texts in self.captions], dtype=torch.int64)
        return [text for texts in self.captions for text in texts], self.pid_N.repeat_interleave(counts)


@dataclass(frozen=True)
class BaselineData:
    """What the closed-form learners are fitted on and scored with; a task whose part is None gets None.

    Attributes:
        identity_train: fits the whitening (I2I training identities).
        query: I2I queries.
        gallery: I2I gallery with distractors and without junk.
        caption_train: fits the ridge regression (captioned training images).
        caption_gallery: T2I test images; their captions are the queries.
    """

    identity_train: ImageSet | None = None
    query: ImageSet | None = None
    gallery: ImageSet | None = None
    caption_train: ImageSet | None = None
    caption_gallery: ImageSet | None = None


def stripe_histogram(image_NHWC: Tensor) -> Tensor:
    """Colour histograms of 8 horizontal stripes: 4x4x4 RGB bins each, square-rooted, L2-normalised.

    A pixel is shared between its 8 nearest bins by trilinear weights: with hard bins a small
    change of light moves a plain garment into another bin, and the learner would be too weak a floor.

    Args:
        image_NHWC: uint8 [N, H, W, 3] with H >= 8.

    Returns:
        fp64 [N, 512].
    """
    n, height, _, channels = image_NHWC.shape
    if image_NHWC.dtype != torch.uint8 or channels != 3 or height < STRIPES:
        raise ValueError(f"need uint8 [N, H >= {STRIPES}, W, 3], got {image_NHWC.dtype} {tuple(image_NHWC.shape)}")
    out_ND = torch.zeros(n, STRIPES * LEVELS**3, dtype=torch.float64, device=image_NHWC.device)
    for start in range(0, n, IMAGES_AT_A_TIME):
        _count_colours(
            image_NHWC[start : start + IMAGES_AT_A_TIME],
            out_ND[start : start + IMAGES_AT_A_TIME],
        )
    return torch.nn.functional.normalize(out_ND.sqrt())


def _count_colours(image_NHWC: Tensor, count_ND: Tensor) -> None:
    """Adds every pixel's weights to the bins of its stripe, in place."""
    height = image_NHWC.shape[1]
    place_NHWC = image_NHWC.double() * ((LEVELS - 1) / 255)
    low_NHWC = place_NHWC.long().clamp_max(LEVELS - 2)
    share_NHWC = place_NHWC - low_NHWC
    stripe_H1 = (torch.arange(height, device=image_NHWC.device) * STRIPES // height)[:, None]
    for corner in product((0, 1), repeat=3):
        bin_NHW, weight_NHW = stripe_H1, torch.ones_like(share_NHWC[..., 0])
        for channel, up in enumerate(corner):
            bin_NHW = bin_NHW * LEVELS + low_NHWC[..., channel] + up
            share_NHW = share_NHWC[..., channel]
            weight_NHW = weight_NHW * (share_NHW if up else 1.0 - share_NHW)
        count_ND.scatter_add_(1, bin_NHW.flatten(1), weight_NHW.flatten(1))


@dataclass(frozen=True)
class WithinClassWhitening:
    """x -> (x - mean) A with A A^T the inverse of the regularised within-class covariance.

    Directions in which images of ONE person differ (pose, light, camera) lose weight; what remains tells
    persons apart. This is linear discriminant analysis without the projection.
    """

    mean_D: Tensor
    factor_DD: Tensor

    @classmethod
    def fit(cls, feature_ND: Tensor, pid_N: Tensor, shrinkage: float = 0.1) -> WithinClassWhitening:
        """Fits on labelled features.

        Args:
            feature_ND: [N, D].
            pid_N: [N] identities; those with a single image tell nothing about the spread.
            shrinkage: a in (1 - a) S + a tr(S)/D I, with S the within-class covariance.

        Raises:
            UserError: no identity has two different images.
        """
        feature_ND = feature_ND.double()
        _, class_N = torch.unique(pid_N.to(feature_ND.device), return_inverse=True)
        size_C = class_N.bincount()
        sum_CD = feature_ND.new_zeros(len(size_C), feature_ND.shape[1]).index_add_(0, class_N, feature_ND)
        centred_ND = feature_ND - (sum_CD / size_C[:, None])[class_N]
        freedom = max(1, len(class_N) - len(size_C))
        scatter_DD = centred_ND.T @ centred_ND / freedom
        scale = float(scatter_DD.diagonal().mean())
        if scale <= 1e-15:
            raise UserError("baselines: whitening needs training identities with at least two different images")
        eye_DD = torch.eye(len(scatter_DD), dtype=torch.float64, device=scatter_DD.device)
        inverse_DD = torch.linalg.inv((1.0 - shrinkage) * scatter_DD + shrinkage * scale * eye_DD)
        return cls(
            feature_ND.mean(dim=0),
            torch.linalg.cholesky((inverse_DD + inverse_DD.T) / 2.0),
        )

    def transform(self, feature_ND: Tensor) -> Tensor:
        """Whitened fp64 features [N, D]; score them by cosine."""
        return (feature_ND.double() - self.mean_D) @ self.factor_DD


def _words(caption: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", caption.lower()))


@dataclass(frozen=True)
class RidgeWords:
    """Ridge regression from image features to weighted caption words; both sides then live in word space.

    A caption is its set of words times idf, minus the mean over the training images; an image is the
    prediction of that vector from its features.
    """

    column: dict[str, int]
    idf_V: Tensor
    word_mean_V: Tensor
    feature_mean_D: Tensor
    weight_DV: Tensor

    @classmethod
    def fit(cls, feature_ND: Tensor, captions: Sequence[Sequence[str]], penalty: float = 0.1) -> RidgeWords:
        """Fits on captioned images; images without a caption are left out.

        Args:
            feature_ND: [N, D].
            captions: per image its captions; the target is the mean of their word vectors.
            penalty: the ridge is `penalty` times the mean feature variance.

        Raises:
            UserError: there are no captions.
        """
        has_N = torch.tensor([len(texts) > 0 for texts in captions], device=feature_ND.device)
        sets = [[_words(text) for text in texts] for texts in captions if texts]
        count = Counter(word for words in sets for one in words for word in one)
        if not count:
            raise UserError("baselines: the ridge regression needs captioned training images, found no caption")
        column = {word: i for i, word in enumerate(sorted(count))}
        total = sum(len(words) for words in sets)
        idf = [math.log((1.0 + total) / (1.0 + count[word])) for word in column]
        idf_V = torch.tensor(idf, dtype=torch.float64, device=feature_ND.device)
        word_NV = torch.stack([_bags(words, column).mean(dim=0) for words in sets]).to(idf_V.device) * idf_V
        feature_ND = feature_ND.double()[has_N]
        feature_mean_D, word_mean_V = feature_ND.mean(dim=0), word_NV.mean(dim=0)
        centred_ND = feature_ND - feature_mean_D
        covariance_DD = centred_ND.T @ centred_ND / len(centred_ND)
        ridge = penalty * float(covariance_DD.diagonal().mean()) + 1e-12
        covariance_DD.diagonal().add_(ridge)
        cross_DV = centred_ND.T @ (word_NV - word_mean_V) / len(centred_ND)
        return cls(
            column,
            idf_V,
            word_mean_V,
            feature_mean_D,
            torch.linalg.solve(covariance_DD, cross_DV),
        )

    def encode_text(self, captions: Iterable[str]) -> Tensor:
        """Captions to fp64 word vectors [M, V]; unknown words are ignored."""
        bag_MV = _bags([_words(text) for text in captions], self.column).to(self.idf_V.device)
        return bag_MV * self.idf_V - self.word_mean_V

    def encode_image(self, feature_ND: Tensor) -> Tensor:
        """Image features to predicted fp64 word vectors [N, V]."""
        return (feature_ND.double() - self.feature_mean_D) @ self.weight_DV


def _bags(word_sets: Sequence[set[str]], column: dict[str, int]) -> Tensor:
    """0/1 word vectors [M, V]."""
    bag_MV = torch.zeros(len(word_sets), len(column), dtype=torch.float64)
    pairs = [(i, column[word]) for i, words in enumerate(word_sets) for word in words if word in column]
    if pairs:
        place_2E = torch.tensor(pairs).T
        bag_MV[place_2E[0], place_2E[1]] = 1.0
    return bag_MV


def closed_form_baselines(data: BaselineData) -> dict[str, Pair]:
    """Chance and the closed-form learners, fitted on training identities and scored by the common protocol.

    Returns:
        {"chance" | "raw_histogram" | "histogram" | "ridge": {"t2i": metrics | None, "i2i": metrics | None}};
        "histogram" is the whitened one. The ridge regression scores I2I with its predicted word vectors.
    """
    table: dict[str, Pair] = {
        name: {"t2i": None, "i2i": None} for name in ("chance", "raw_histogram", "histogram", "ridge")
    }
    words = None
    if data.caption_train is not None:
        words = RidgeWords.fit(stripe_histogram(data.caption_train.image_NHWC), data.caption_train.captions)
    if data.caption_gallery is not None:
        gallery = data.caption_gallery
        texts, text_pid_M = gallery.texts()
        table["chance"]["t2i"] = chance_metrics(text_pid_M, gallery.pid_N)
        if words is not None:
            image_NV = words.encode_image(stripe_histogram(gallery.image_NHWC))
            table["ridge"]["t2i"] = t2i_metrics(words.encode_text(texts), image_NV, text_pid_M, gallery.pid_N)
    if data.query is not None and data.gallery is not None:
        _image_baselines(table, data.query, data.gallery, data.identity_train, words)
    return table


def _image_baselines(
    table: dict[str, Pair],
    query: ImageSet,
    gallery: ImageSet,
    train: ImageSet | None,
    words: RidgeWords | None,
) -> None:
    """Fills the I2I column of the table."""
    labels = (query.pid_N, gallery.pid_N, query.camid_N, gallery.camid_N)
    query_QD, gallery_GD = (
        stripe_histogram(query.image_NHWC),
        stripe_histogram(gallery.image_NHWC),
    )
    table["chance"]["i2i"] = chance_metrics(*labels)
    table["raw_histogram"]["i2i"] = i2i_metrics(query_QD, gallery_GD, *labels)
    if train is not None:
        whitening = WithinClassWhitening.fit(stripe_histogram(train.image_NHWC), train.pid_N)
        table["histogram"]["i2i"] = i2i_metrics(whitening.transform(query_QD), whitening.transform(gallery_GD), *labels)
    if words is not None:
        table["ridge"]["i2i"] = i2i_metrics(words.encode_image(query_QD), words.encode_image(gallery_GD), *labels)
