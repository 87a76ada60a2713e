"""Closed-form learners on toys with a known answer."""

import pytest
import torch
from torch import Tensor

from reid_dist.errors import UserError
from reid_dist.evaluation.baselines import (
    BaselineData,
    ImageSet,
    RidgeWords,
    WithinClassWhitening,
    closed_form_baselines,
    stripe_histogram,
)
from reid_dist.evaluation.ranking import i2i_metrics

COLOURS = {
    "red": (220, 20, 20),
    "green": (20, 200, 20),
    "blue": (20, 20, 220),
    "white": (250, 250, 250),
}


def people(ids: int, images: int, seed: int) -> ImageSet:
    """16x8 persons of two plain colours; the sentence names both; cameras brighten the image a little."""
    make = torch.Generator().manual_seed(seed)
    names = list(COLOURS)
    picture, pid, camid, captions = [], [], [], []
    for person in range(ids):
        top, legs = (names[int(i)] for i in torch.randint(0, 4, (2,), generator=make))
        for shot in range(images):
            body = torch.tensor([COLOURS[top]] * 8 + [COLOURS[legs]] * 8)[:, None, :].expand(16, 8, 3)
            noise = torch.randint(-15, 16, (16, 8, 3), generator=make)
            picture.append((body + noise).clamp(0, 255).to(torch.uint8))
            pid.append(person)
            camid.append(shot)
            captions.append([f"A person in a {top} shirt and {legs} trousers."])
    return ImageSet(torch.stack(picture), torch.tensor(pid), torch.tensor(camid), captions)


def split(images: ImageSet) -> tuple[ImageSet, ImageSet]:
    first = images.camid_N == 0
    return tuple(
        ImageSet(
            images.image_NHWC[m],
            images.pid_N[m],
            images.camid_N[m],
            [[] for _ in range(int(m.sum()))],
        )
        for m in (first, ~first)
    )


def test_histogram_counts_the_pixels_of_each_stripe() -> None:
    image = torch.zeros(2, 17, 5, 3, dtype=torch.uint8)  # 17 rows do not divide by 8
    image[1, :, :, 0] = 255
    feature = stripe_histogram(image)
    assert feature.shape == (2, 512) and feature.dtype == torch.float64
    assert feature.norm(dim=1).tolist() == pytest.approx([1.0, 1.0])
    by_stripe = feature.view(2, 8, 64)
    assert bool((by_stripe[0, :, 1:] == 0).all()) and bool((by_stripe[0, :, 0] > 0).all())
    assert bool((by_stripe[1, :, 48] > 0).all()) and int((by_stripe[1] > 0).sum()) == 8
    assert by_stripe[0, 0, 0] == pytest.approx((3 / 17) ** 0.5)  # rows 0, 1 and 2


def test_histogram_does_not_depend_on_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = people(9, 2, seed=0).image_NHWC
    whole = stripe_histogram(image)
    monkeypatch.setattr("reid_dist.evaluation.baselines.IMAGES_AT_A_TIME", 5)
    assert torch.equal(whole, stripe_histogram(image))
    with pytest.raises(ValueError, match="uint8"):
        stripe_histogram(image.float())


def test_whitening_removes_what_one_person_varies_in() -> None:
    make = torch.Generator().manual_seed(3)

    def world(ids: int) -> tuple[Tensor, Tensor, Tensor]:
        person = torch.randn(ids, 4, generator=make).repeat_interleave(4, dim=0)
        nuisance = 6.0 * torch.randn(ids * 4, 4, generator=make)  # as large as a change of camera
        return (
            torch.cat([person, nuisance], 1),
            torch.arange(ids).repeat_interleave(4),
            torch.arange(4).repeat(ids),
        )

    train, pid, _ = world(60)
    test, test_pid, camid = world(40)
    query = camid == 0

    def score(x: Tensor) -> float:
        return i2i_metrics(
            x[query],
            x[~query],
            test_pid[query],
            test_pid[~query],
            camid[query],
            camid[~query],
        )["mAP"]

    whitening = WithinClassWhitening.fit(train, pid, shrinkage=1e-4)
    assert score(test) < 25 and score(whitening.transform(test)) > 90


def test_whitened_covariance_is_the_identity_without_shrinkage() -> None:
    make = torch.Generator().manual_seed(4)
    x, pid = (
        torch.randn(400, 5, generator=make) * torch.tensor([1.0, 2, 3, 4, 5]),
        torch.arange(100).repeat(4),
    )
    white = WithinClassWhitening.fit(x, pid, shrinkage=0.0).transform(x)
    mean = torch.zeros(100, 5, dtype=torch.float64).index_add_(0, pid, white) / 4
    inner = white - mean[pid]
    assert torch.allclose(inner.T @ inner / 300, torch.eye(5, dtype=torch.float64), atol=1e-10)


def test_whitening_needs_pairs() -> None:
    with pytest.raises(UserError, match="at least two"):
        WithinClassWhitening.fit(torch.randn(5, 3), torch.arange(5))


def test_ridge_predicts_the_words() -> None:
    train = people(40, 2, seed=1)
    words = RidgeWords.fit(stripe_histogram(train.image_NHWC), train.captions)
    predicted = words.encode_image(stripe_histogram(train.image_NHWC)) + words.word_mean_V
    red_top = torch.tensor(["red shirt" in texts[0] for texts in train.captions])
    red_legs = torch.tensor(["red trousers" in texts[0] for texts in train.captions])
    red = predicted[:, words.column["red"]]
    assert red[red_top | red_legs].min() > red[~(red_top | red_legs)].max()
    assert words.encode_text(["zebra"]).equal(words.encode_text([""]))  # unknown words are ignored


def test_ridge_needs_captions_and_skips_images_without() -> None:
    train = people(10, 1, seed=1)
    feature = stripe_histogram(train.image_NHWC)
    with pytest.raises(UserError, match="caption"):
        RidgeWords.fit(feature, [[] for _ in range(10)])
    half = [texts if i < 5 else [] for i, texts in enumerate(train.captions)]
    some, alone = (
        RidgeWords.fit(feature, half),
        RidgeWords.fit(feature[:5], train.captions[:5]),
    )
    assert torch.equal(some.weight_DV, alone.weight_DV)


def test_all_baselines_on_the_toy() -> None:
    query, gallery = split(people(30, 3, seed=9))
    data = BaselineData(
        people(50, 3, seed=1),
        query,
        gallery,
        people(50, 2, seed=2),
        people(30, 2, seed=9),
    )
    table = closed_form_baselines(data)
    assert set(table) == {"chance", "raw_histogram", "histogram", "ridge"}
    chance_t2i, ridge_t2i = table["chance"]["t2i"], table["ridge"]["t2i"]
    assert chance_t2i is not None and ridge_t2i is not None and ridge_t2i["R1"] > 5 * chance_t2i["R1"]
    assert table["histogram"]["t2i"] is None and table["raw_histogram"]["t2i"] is None
    for name in table:
        assert table[name]["i2i"] is not None


def test_missing_parts_give_none() -> None:
    query, gallery = split(people(6, 3, seed=9))
    table = closed_form_baselines(BaselineData(query=query, gallery=gallery))
    assert table["chance"]["i2i"] is not None and table["chance"]["t2i"] is None
    assert table["ridge"] == {"t2i": None, "i2i": None} and table["histogram"]["i2i"] is None
    assert closed_form_baselines(BaselineData())["chance"] == {"t2i": None, "i2i": None}
