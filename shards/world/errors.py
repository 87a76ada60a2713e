"""Which attributes a model confuses: wrong first matches counted by what the two people differ in."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

SEVERAL, STRANGER = "several attributes", "another family"


@dataclass(frozen=True)
class AttributeErrors:
    """Wrong first matches of a model on a procedural world.

    Attributes:
        queries: All queries.
        errors: Queries whose first match is another person.
        share: Per attribute the share of the errors in which the found person is a sibling that differs from the
            right one in this attribute alone; SEVERAL for siblings that differ in two, STRANGER for people of
            another family. Sums to 1, the most frequent first; empty without errors.
        rate: Per attribute such errors as a share of the queries that could end in one, that is whose person has a
            sibling that differs in this attribute alone: comparable between rare and frequent attributes.
    """

    queries: int
    errors: int
    share: dict[str, float]
    rate: dict[str, float]


def _kind(right: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Return the attribute in which two people of a world differ, SEVERAL or STRANGER."""
    if (right["split"], right["family"]) != (found["split"], found["family"]):
        return STRANGER
    # The base has no diff; two siblings may have changed the same attribute in two ways.
    differing = {card["diff"] for card in (right, found) if card["diff"] is not None}
    return str(differing.pop()) if len(differing) == 1 else SEVERAL


def errors_by_attribute(
    identities: Mapping[str, Mapping[str, Any]], matches: Iterable[tuple[str, str]]
) -> AttributeErrors:
    """Count wrong first matches by the attribute in which the found person differs from the right one.

    Args:
        identities: `identities` of a world.json: cards by the person's number in the tree. Numbers that it lacks (the
            distractors of a Market-1501 tree, all called "0") count as another family.
        matches: Per query the number of the right person and that of the first match.

    Raises:
        KeyError: A query's own person is not among the identities.
    """
    families: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for card in identities.values():
        families.setdefault((card["split"], card["family"]), []).append(card)
    possible: dict[str, set[str]] = {}
    queries, wrong, chances = 0, Counter[str](), Counter[str]()
    for right, found in matches:
        queries += 1
        own = identities[right]
        if right not in possible:
            others = families[own["split"], own["family"]]
            possible[right] = {_kind(own, other) for other in others if other["key"] != own["key"]} - {SEVERAL}
        chances.update(possible[right])
        if found != right:
            wrong[_kind(own, identities[found]) if found in identities else STRANGER] += 1
    errors = sum(wrong.values())
    share = {name: count / errors for name, count in wrong.most_common()}
    rates = sorted(((wrong[name] / count, name) for name, count in chances.items()), reverse=True)
    return AttributeErrors(queries, errors, share, {name: rate for rate, name in rates})
