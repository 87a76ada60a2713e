"""The oracle against readers that are played through, and its rules on small worlds."""

import random
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from reid_dist.errors import UserError
from shards.world.export import export
from shards.world.identity import effective
from shards.world.oracle import ceilings, contradictions, estrangement, image_ceiling, read_world, text_ceiling
from shards.world.spec import ExportSpec, World
from shards.world.ties import METRICS

BASE = {"pattern": "plain", "hair": "bald", "bag": "none", "hat": "none", "upper_colour": "red"}


def _tree(attributes: dict[str, dict[str, str]], **more: object) -> dict[str, object]:
    cards = {number: {"split": "test", "attributes": values} for number, values in attributes.items()}
    return {"identities": cards, "parameters": {"world": {"seed": 0}}, **more}


def test_text_ceiling_ties_the_identities_that_agree() -> None:
    people = {"1": BASE, "2": {**BASE, "upper_colour": "blue"}}
    shots = {f"test_query/p{number}_s{shot}.jpg": [0, 0, "front"] for number in (1, 2) for shot in (1, 2)}
    mentions = {path: [[["hair", "bald"]], [["upper_colour", "red" if "p1" in path else "blue"]]] for path in shots}
    result = text_ceiling(_tree(people, shots=shots, mentions=mentions))
    assert result["queries"] == 8
    assert result["R1"] == pytest.approx(75.0)
    assert set(result) == {"R1", "R5", "R10", "mAP", "mINP", "queries"}


def test_image_ceiling_follows_the_market_rules() -> None:
    people = {"1": BASE, "2": {**BASE, "upper_colour": "blue"}}
    shots = {
        "query/0001_c1s1_000000_00.jpg": [0, 0, "front"],
        "query/0002_c1s1_000000_00.jpg": [0, 0, "front"],
        "bounding_box_test/0001_c1s1_000001_01.jpg": [0, 1, "front"],
        "bounding_box_test/0001_c2s1_000001_02.jpg": [1, 0, "front"],
        "bounding_box_test/0002_c1s1_000001_01.jpg": [0, 1, "front"],
        "bounding_box_test/0000_c3s1_000001_01.jpg": [2, 0, "front"],
        "bounding_box_test/-1_c3s1_000001_01.jpg": [2, 0, "front"],
        "images/0000_c4s1_000001_01.jpg": [3, 0, "front"],
    }
    strangers = {path: {"attributes": BASE} for path in shots if "/0000" in path or "/-1" in path}
    result = image_ceiling(_tree(people, shots=shots, strangers=strangers))
    # Query 1: its own camera dropped, junk dropped, the distractor looks the same: 1 positive of 2 tied.
    # Query 2 has no positive on another camera and is left out.
    assert result["queries"] == 1
    assert result["R1"] == pytest.approx(50.0)
    assert result["mAP"] == pytest.approx(75.0)


def test_contradictions() -> None:
    assert contradictions([["upper_colour", "red"], ["bag", "none"]], BASE) == 0
    assert contradictions([["upper_colour", "blue"], ["bag", "none"]], BASE) == 1


def test_missing_or_wrong_tree(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not there"):
        read_world(tmp_path, "cuhk_pedes")
    (tmp_path / "world.json").write_text('{"parameters": {"format": "market1501"}}')
    with pytest.raises(UserError, match="holds a market1501 tree"):
        read_world(tmp_path, "cuhk_pedes")
    with pytest.raises(UserError, match="does not tell of its pictures"):
        read_world(tmp_path, "market1501")


INSTANCE = World(5, 0.6, 3, 0.6, 0.1, instance=0.8)
PEOPLE, IMAGES = 12, 5


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("oracle")
    for form in ("cuhk_pedes", "market1501"):
        export(ExportSpec(form, INSTANCE, 1, PEOPLE, 0, IMAGES, 0.4), root / form)
    return root


def _metrics_of(hits: list[bool]) -> dict[str, float]:
    places = [place for place, hit in enumerate(hits, start=1) if hit]
    return {
        **{f"R{rank}": float(places[0] <= rank) for rank in (1, 5, 10)},
        "mAP": mean(hit / place for hit, place in enumerate(places, start=1)),
        "mINP": len(places) / places[-1],
    }


def _drawn_gallery() -> list[dict[str, Any]]:
    """Return what each test picture shows, from the drawing itself and not from world.json."""
    gallery = []
    for index in range(PEOPLE):
        identity = INSTANCE.identity("test", index)
        person = effective(identity.attributes)
        for camera, k in INSTANCE.shots(identity, IMAGES):
            picture = INSTANCE.picture(identity, camera, k)
            assert picture.moment is not None
            captions = INSTANCE.captions(identity, camera, k, picture)
            facts = {"image.view": picture.view, "image.pose": picture.moment.pose, "image.bag": picture.moment.bag,
                     "image.bag_colour": picture.moment.bag_colour}  # fmt: skip
            gallery.append({"who": index, "facts": {**person, **facts}, "look": sorted(person.items()),
                            "bag": (person["bag"], person["bag_colour"]),
                            "mentions": [caption.mentions for caption in captions]})  # fmt: skip
    return gallery


def _played(knows_pictures: bool, rounds: int) -> list[dict[str, float]]:
    """Let a reader rank every sentence with freshly shuffled ties, round after round."""
    gallery, shuffle = _drawn_gallery(), random.Random(9)

    def wrong(mentions: Any, picture: dict[str, Any], about_picture: bool) -> int:
        relevant = [(name, value) for name, value in mentions if name.startswith("image.") == about_picture]
        return sum(picture["facts"][name] != value for name, value in relevant)

    def fits(mentions: Any, bag: tuple[str, str]) -> int:
        log = dict(mentions)
        wanted = (log.get("image.bag"), log.get("image.bag_colour"))
        if all(word in (None, own) for word, own in zip(wanted, bag, strict=True)):
            return 0
        return 1 if bag[0] == "none" else 2

    queries = [(picture["who"], mentions) for picture in gallery for mentions in picture["mentions"]]
    keys: list[list[tuple[int, ...]]] = []
    for _, mentions in queries:
        person = [wrong(mentions, picture, False) for picture in gallery]
        missed = [wrong(mentions, picture, True) for picture in gallery]
        least = [min(m for m, p in zip(missed, gallery, strict=True) if p["look"] == one["look"]) for one in gallery]
        bags = [fits(mentions, picture["bag"]) for picture in gallery]
        keys.append(
            list(zip(person, least, missed, strict=True)) if knows_pictures else list(zip(person, bags, strict=True))
        )
    rounds_found = []
    for _ in range(rounds):
        found = []
        for (who, _), key in zip(queries, keys, strict=True):
            order = sorted(range(len(gallery)), key=lambda place: (key[place], shuffle.random()))
            found.append(_metrics_of([gallery[place]["who"] == who for place in order]))
        rounds_found.append({name: 100 * mean(one[name] for one in found) for name in METRICS})
    return rounds_found


@pytest.mark.parametrize("knows_pictures", [True, False])
def test_text_ceiling_equals_readers_with_random_ties(trees: Path, knows_pictures: bool) -> None:
    rounds = 40
    played = _played(knows_pictures, rounds)
    exact = text_ceiling(read_world(trees / "cuhk_pedes", "cuhk_pedes"), knows_pictures)
    for name in METRICS:
        values = [one[name] for one in played]
        assert exact[name] == pytest.approx(mean(values), abs=4 * stdev(values) / rounds**0.5 + 1e-9), name
    assert exact["queries"] == 2 * PEOPLE * IMAGES


def test_what_holds_for_the_picture_is_worth_something(trees: Path) -> None:
    result = ceilings(trees / "cuhk_pedes", trees / "market1501")
    assert set(result) == {"t2i", "i2i", "t2i_people"}
    assert result["t2i"]["R1"] > result["t2i_people"]["R1"] + 3
    assert result["t2i"]["mAP"] > result["t2i_people"]["mAP"]
    assert result["i2i"]["R1"] == 100


def test_the_bag_of_a_person_in_words() -> None:
    owner = {"bag": "backpack", "bag_colour": "red"}
    none = {"bag": "none", "bag_colour": "none"}
    said = [("image.bag", "backpack"), ("image.pose", "running"), ("image.bag_colour", "red")]
    assert [estrangement(said, person) for person in (owner, none, {**owner, "bag_colour": "blue"})] == [0, 1, 2]
    assert (
        estrangement([("image.pose", "running")], none) == 0 == estrangement(said[:1], {**owner, "bag_colour": "blue"})
    )
