"""The numbers that the data sets' authors published, typed a second time; `pytest -s` prints the table."""

import dataclasses

import pytest

from shards.raw import Counts
from shards.write import CONVERTERS

_ = None
# converter, variant, part, identities, images, captions, cameras
PUBLISHED = [
    ("cuhk_pedes", "standard", "train", 11003, 34054, 68126, _),
    ("cuhk_pedes", "standard", "val", 1000, 3078, 6158, _),
    ("cuhk_pedes", "standard", "test", 1000, 3074, 6156, _),
    ("cuhk_pedes", "caption_all", "train", 13003, 40206, 80440, _),
    ("icfg_pedes", "standard", "train", 3102, 34674, 34674, _),
    ("icfg_pedes", "standard", "test", 1000, 19848, 19848, _),
    ("rstp_reid", "standard", "train", 3701, 18505, 37010, 15),
    ("rstp_reid", "standard", "val", 200, 1000, 2000, _),
    ("rstp_reid", "standard", "test", 200, 1000, 2000, _),
    ("ufine6926", "standard", "train", 4926, 18577, 37154, _),
    ("ufine6926", "standard", "test", 2000, 7629, 15258, _),
    ("market1501", "standard", "train", 751, 12936, _, 6),
    ("market1501", "standard", "query", 750, 3368, _, 6),
    ("market1501", "standard", "gallery", 750, 15913, _, 6),
    ("market1501", "standard", "junk", _, 3819, _, _),
    ("market1501", "distractors_500k", "train", 751, 12936, _, 6),
    ("market1501", "distractors_500k", "query", 750, 3368, _, 6),
    ("market1501", "distractors_500k", "gallery", 750, 15913, _, 6),
    ("market1501", "distractors_500k", "junk", _, 3819, _, _),
    ("market1501", "distractors_500k", "distractors_500k", _, _, _, _),  # "500k" is round
    ("msmt17", "train", "train", 1041, 30248, _, 15),
    ("msmt17", "train", "val", 1041, 2373, _, _),
    ("msmt17", "train", "query", 3060, 11659, _, 15),
    ("msmt17", "train", "gallery", 3060, 82161, _, 15),
    ("msmt17", "train_val", "train", 1041, 32621, _, 15),
    ("msmt17", "train_val", "query", 3060, 11659, _, 15),
    ("msmt17", "train_val", "gallery", 3060, 82161, _, 15),
    ("cuhk03_np", "detected", "train", 767, 7365, _, 2),
    ("cuhk03_np", "detected", "query", 700, 1400, _, 2),
    ("cuhk03_np", "detected", "gallery", 700, 5332, _, 2),
    ("cuhk03_np", "labeled", "train", 767, 7368, _, 2),
    ("cuhk03_np", "labeled", "query", 700, 1400, _, 2),
    ("cuhk03_np", "labeled", "gallery", 700, 5328, _, 2),
    # 4 M and 10 M / 430 K in round numbers; these are the exact ones of the papers.
    ("luperson", "folder", "train", _, 4180243, _, _),
    ("luperson", "folder_nl", "train", 433997, 10683716, _, _),
    ("luperson", "lmdb", "train", _, 4180243, _, _),
    ("luperson", "lmdb_nl", "train", 433997, 10683716, _, _),
    # 4.79 M and 12.1 M in round numbers.
    ("synth_pedes", "standard", "train", 312321, 4791711, 12138157, _),
    ("synth_pedes", "prompts", "train", 312321, 4791711, _, _),
    ("mals", "standard", "train", _, 1510330, 1510330, _),
    ("luperson_mllm", "standard", "train", _, _, _, _),  # "1 M images, 4 captions each" is round
    ("webperson", "1m", "train", _, 1000000, 2000000, _),
    ("webperson", "5m", "train", _, 5002723, 10005446, _),
    ("coco", "official", "train", _, 118287, 591753, _),
    ("coco", "official", "val", _, 5000, 25014, _),
    ("coco", "karpathy", "train", _, 113287, 566747, _),
    ("coco", "karpathy", "val", _, 5000, 25010, _),
    ("coco", "karpathy", "test", _, 5000, 25010, _),
    ("flickr30k", "standard", "train", _, 29000, 145000, _),
    ("flickr30k", "standard", "val", _, 1014, 5070, _),
    ("flickr30k", "standard", "test", _, 1000, 5000, _),
]
# What the authors say of a whole set: identities, images, captions, where the parts of a variant add up to it.
TOTALS = {
    ("cuhk_pedes", "standard"): (13003, 40206, 80440),
    ("cuhk_pedes", "caption_all"): (13003, 40206, 80440),
    ("icfg_pedes", "standard"): (4102, 54522, 54522),
    ("rstp_reid", "standard"): (4101, 20505, 41010),
    ("ufine6926", "standard"): (6926, 26206, 52412),
}


def test_published_counts() -> None:
    table = {(name, variant, part): Counts(*counts) for name, variant, part, *counts in PUBLISHED}
    expected = {
        (name, variant, part): counts
        for name, converter in CONVERTERS.items()
        for variant, parts in converter.EXPECTED.items()
        for part, counts in parts.items()
    }
    heads = ["identities", "images", "captions", "cameras"]
    print("\n" + f"{'converter':16}{'variant':18}{'part':18}" + "".join(f"{head:>12}" for head in heads))
    for (name, variant, part), counts in expected.items():
        cells = ("-" if value is None else f"{value:,}" for value in dataclasses.astuple(counts))
        print(f"{name:16}{variant:18}{part:18}" + "".join(f"{cell:>12}" for cell in cells))
    assert expected == table
    # What every copy has in another size, and anyone's own data.
    assert set(CONVERTERS) - {name for name, *_ in table} == {"img2dataset", "wit", "folder", "csv", "jsonl"}


@pytest.mark.parametrize(("name", "variant"), list(TOTALS))
def test_parts_add_up_to_the_published_total(name: str, variant: str) -> None:
    parts = [dataclasses.astuple(counts)[:3] for counts in CONVERTERS[name].EXPECTED[variant].values()]
    assert tuple(sum(column) for column in zip(*parts, strict=True)) == TOTALS[name, variant]


def test_msmt17_val_is_what_the_larger_training_set_has_more() -> None:
    train, both = (CONVERTERS["msmt17"].EXPECTED[variant] for variant in ("train", "train_val"))
    assert (train["train"].images or 0) + (train["val"].images or 0) == both["train"].images


@pytest.mark.parametrize("name", list(CONVERTERS))
def test_every_card_names_terms_and_source(name: str) -> None:
    card = CONVERTERS[name].CARD
    assert {"title", "licence", "consent", "source", "citation"} <= set(card)
    assert all(isinstance(card[key], str) and card[key] for key in ("title", "licence", "consent", "source"))
    assert set(card.get("contains", [])) <= set(CONVERTERS)
    assert set(card) <= {"title", "licence", "consent", "source", "citation", "contains"}
