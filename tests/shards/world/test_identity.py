"""Identities: 22 attributes, siblings that differ in one, families inside one split."""

from shards.world.identity import ATTRIBUTES, effective, make_identity


def test_22_attributes_with_listed_values() -> None:
    assert len(ATTRIBUTES) == 22
    for index in range(50):
        attributes = make_identity(3, "train", index, 1).attributes
        assert list(attributes) == list(ATTRIBUTES)
        assert all(value in ATTRIBUTES[name] for name, value in attributes.items())


def test_siblings_differ_in_exactly_the_recorded_attribute() -> None:
    for index in range(0, 160, 4):
        base = make_identity(5, "test", index, 3)
        members = [make_identity(5, "test", index + member, 3) for member in range(1, 4)]
        assert base.diff is None
        for member in members:
            changed = [name for name in ATTRIBUTES if member.attributes[name] != base.attributes[name]]
            assert changed == [member.diff]
            assert effective(member.attributes) != effective(base.attributes)
        assert len({tuple(member.attributes.values()) for member in members}) == 3


def test_families_stay_inside_a_split_and_identities_are_independent_of_counts() -> None:
    keys = {split: [make_identity(1, split, index, 1).key for index in range(20)] for split in ("train", "val", "test")}
    assert len({key for found in keys.values() for key in found}) == 60
    train = [dict(make_identity(1, "train", index, 1).attributes) for index in range(40)]
    test = [dict(make_identity(1, "test", index, 1).attributes) for index in range(40)]
    assert not any(person in train for person in test)
    assert [make_identity(1, "train", index, 1).family for index in range(4)] == [0, 0, 1, 1]
    assert make_identity(1, "train", 7, 1) == make_identity(1, "train", 7, 1)


def test_colour_of_an_absent_thing_counts_as_none() -> None:
    attributes = dict(make_identity(1, "train", 0, 0).attributes, bag="none", hat="none", pattern="plain", hair="bald")
    seen = effective(attributes)
    assert seen["bag_colour"] == seen["hat_colour"] == seen["upper_colour2"] == seen["hair_colour"] == "none"
