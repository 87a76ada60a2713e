"""Exact ceiling: the expected metrics of a reader who knows every attribute, ties in uniformly random order.

Where a world has instance-level content, a sentence says things that hold for its own picture and perhaps for no other
picture of the same person, while every picture of the person counts as right. The reader therefore knows, besides the
attributes of every person, what each picture shows, and ranks by three things in turn:

1. how many statements about the person the pictured person contradicts;
2. how many statements about the picture are contradicted at least by each picture of people who look like this one:
   the sentence was written about one of the pictures, so who has no such picture is not meant;
3. how many statements about the picture this picture contradicts.

Beside it stands a reader of people, who knows their attributes, the bag that they own among them, and not what single
pictures show: no encoder to which all pictures of a person are the same can do better. The distance of the two is what
invariance costs.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reid_dist.errors import UserError
from shards.world.identity import effective
from shards.world.moment import CARRIED, IN_IMAGE, make_moment
from shards.world.ties import Ranking, Tie, mean_metrics, ranking

Facts = Mapping[str, str]
Look = tuple[tuple[str, str], ...]
Counts = np.ndarray[tuple[int, ...], np.dtype[np.int16]]


@dataclass(frozen=True)
class Seen:
    """One picture as the reader knows it.

    Attributes:
        number: Number of the person in the tree, "0" for distractors.
        camera: 0-based camera number.
        person: Attributes of the person.
        moment: What holds for this picture; empty without instance-level content.
    """

    number: str
    camera: int
    person: Facts
    moment: Facts

    @property
    def look(self) -> Look:
        """Attributes of the person, to compare people."""
        return tuple(sorted(self.person.items()))


def contradictions(mentions: Iterable[Sequence[str]], facts: Facts) -> int:
    """Return how many mentions the facts contradict (0 for the right ones unless a word is wrong)."""
    return sum(facts[name] != value for name, value in mentions)


def estrangement(mentions: Iterable[Sequence[str]], person: Facts) -> int:
    """Return how little a mentioned bag fits a person, whatever the picture shows.

    Returns:
        0 for the owner of such a bag or without a mention, 1 for people without a bag, who may have borrowed it, 2 for
        the owner of another one, who never does.
    """
    bag = [(name.removeprefix(IN_IMAGE), value) for name, value in mentions if name.removeprefix(IN_IMAGE) in CARRIED]
    if contradictions(bag, person) == 0:
        return 0
    return 1 if person["bag"] == "none" else 2


def _seen(tree: Mapping[str, Any], number: str, card: Mapping[str, Any], shot: Sequence[Any]) -> Seen:
    """Return the picture; its moment is a function of the world's parameters and the shot, as in the drawing."""
    person = effective(card["attributes"])
    world = tree["parameters"]["world"]
    if not world.get("instance"):
        return Seen(number, shot[0], person, {})
    moment = make_moment(world["seed"], card["key"], card["attributes"], shot[0], shot[1], world["instance"])
    return Seen(number, shot[0], person, moment.facts(shot[2]))


def tested_pictures(tree: Mapping[str, Any]) -> dict[str, Seen]:
    """Return the pictures of test people of a CUHK-PEDES tree by path."""
    found = {}
    for path, shot in tree["shots"].items():
        number = path.rsplit("/", 1)[-1].split("_", 1)[0][1:]
        card = tree["identities"][number]
        if card["split"] == "test":
            found[path] = _seen(tree, number, card, shot)
    return found


class Reader:
    """Ranks the pictures of test people for a sentence."""

    def __init__(self, pictures: Sequence[Seen]) -> None:
        """Group the pictures by person."""
        self._people: dict[str, list[Seen]] = {}
        for picture in pictures:
            self._people.setdefault(picture.number, []).append(picture)
        self._numbers = list(self._people)
        self._looks = {number: found[0].look for number, found in self._people.items()}
        self._against: dict[tuple[str, str], Counts] = {}

    def _wrong(self, mentions: Sequence[Sequence[str]]) -> Counts:
        """Return how many mentions each person contradicts, as an array: there are many people and few mentions."""
        total: Counts = np.zeros(len(self._numbers), dtype=np.int16)
        for name, value in mentions:
            if (name, value) not in self._against:
                differs = [self._people[number][0].person[name] != value for number in self._numbers]
                self._against[name, value] = np.array(differs, dtype=np.int16)
            total += self._against[name, value]
        return total

    def ranking(self, number: str, mentions: Iterable[Sequence[str]], knows_pictures: bool = True) -> Ranking:
        """Return the ties of all pictures.

        Args:
            number: The person whom the sentence describes.
            mentions: What it says.
            knows_pictures: Whether the reader knows what single pictures show, or only people.
        """
        said = list(mentions)
        about_picture = [mention for mention in said if mention[0].startswith(IN_IMAGE)]
        wrong = self._wrong([mention for mention in said if not mention[0].startswith(IN_IMAGE)])
        # People who contradict more than the right one come after all positives: they change nothing.
        places = np.flatnonzero(wrong <= wrong[self._numbers.index(number)]).tolist()
        rivals = {self._numbers[place]: int(wrong[place]) for place in places}
        keys: list[tuple[int, ...]] = []
        hits: list[bool] = []
        if knows_pictures:
            missed = {who: [contradictions(about_picture, seen.moment) for seen in self._people[who]] for who in rivals}
            least: dict[Look, int] = {}
            for who in rivals:
                least[self._looks[who]] = min(least.get(self._looks[who], len(said)), *missed[who])
        for who, count in rivals.items():
            found = self._people[who]
            if knows_pictures:
                keys += [(count, least[self._looks[who]], one) for one in missed[who]]
            else:
                keys += [(count, estrangement(about_picture, found[0].person))] * len(found)
            hits += [who == number] * len(found)
        return ranking(keys, hits)


def text_ceiling(tree: Mapping[str, Any], knows_pictures: bool = True) -> dict[str, float]:
    """Return the T2I ceiling from the world.json of a CUHK-PEDES tree: all test captions against all test images.

    Args:
        tree: The parsed world.json.
        knows_pictures: False for the reader of people.
    """
    pictures = tested_pictures(tree)
    reader = Reader(list(pictures.values()))
    return mean_metrics(
        reader.ranking(pictures[path].number, mentions, knows_pictures)
        for path, captions in tree["mentions"].items()
        if path in pictures
        for mentions in captions
    )


def _market_pictures(tree: Mapping[str, Any], folder: str) -> Iterator[Seen]:
    for path, shot in tree["shots"].items():
        place, name = path.split("/", 1)
        number = str(int(name.split("_", 1)[0]))
        if place == folder and number != "-1":
            yield _seen(tree, number, tree["strangers"].get(path) or tree["identities"][number], shot)


def image_ceiling(tree: Mapping[str, Any]) -> dict[str, float]:
    """Return the I2I ceiling from the world.json of a Market-1501 tree under the Market rules.

    Same identity seen by the same camera is left out, junk is left out, distractors stay; images of people with
    exactly the query's attributes are tied first. Queries without a positive are left out. What holds for single
    pictures changes nothing: here the reader knows people.
    """
    gallery: dict[Look, list[Seen]] = {}
    for picture in _market_pictures(tree, "bounding_box_test"):
        gallery.setdefault(picture.look, []).append(picture)
    rankings = []
    for query in _market_pictures(tree, "query"):
        own = (query.number, query.camera)
        tied = [seen for seen in gallery.get(query.look, ()) if (seen.number, seen.camera) != own]
        positives = sum(seen.number == query.number for seen in tied)
        if positives:
            rankings.append((Tie(len(tied), positives),))
    return mean_metrics(rankings)


def read_world(root: Path, wanted: str) -> dict[str, Any]:
    """Return the world.json of a tree of the wanted format.

    Raises:
        UserError: It is absent, unreadable or of another format.
    """
    path = root / "world.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        found = tree["parameters"]["format"]
        complete = found != wanted or {"identities", "shots", "mentions"} <= tree.keys()
    except OSError:
        raise UserError(f"{path}: not there; name a tree written by `python -m shards.world export {wanted}`") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: cannot be read; export the tree again") from None
    if found != wanted:
        raise UserError(f"{path}: holds a {found} tree, a {wanted} tree is needed here")
    if not complete:
        raise UserError(f"{path}: does not tell of its pictures; export the tree again")
    return dict(tree)


def ceilings(cuhk_root: Path, market_root: Path) -> dict[str, dict[str, float]]:
    """Return the oracle of both query kinds, metrics in percent.

    Returns:
        "t2i" and "i2i"; with instance-level content also "t2i_people", the reader who knows no single pictures.
    """
    tree = read_world(cuhk_root, "cuhk_pedes")
    result = {"t2i": text_ceiling(tree), "i2i": image_ceiling(read_world(market_root, "market1501"))}
    if tree["parameters"]["world"].get("instance"):
        result["t2i_people"] = text_ceiling(tree, knows_pictures=False)
    return result
