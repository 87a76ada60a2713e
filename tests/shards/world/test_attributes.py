"""What the people of a shard set look like is told to the set, and only to the one made of that tree."""

import json
from pathlib import Path

import pytest

from reid_dist.data.reader import ShardSet
from reid_dist.errors import UserError
from reid_dist.report.attributes import read_attributes
from shards.world.__main__ import main
from shards.world.attributes import write_attributes
from shards.world.export import export
from shards.world.identity import effective
from shards.world.spec import ExportSpec, World
from shards.write import write

FORMATS = {"cuhk_pedes": 0, "market1501": 0, "icfg_pedes": -1, "rstp_reid": -1, "ufine6926": 0}
WORLD = World(4, 0.3, 1, 0.7, 0.0)


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("attributes")
    for name in FORMATS:
        export(ExportSpec(name, WORLD, 2, 3, 0, 2, 0.4), root / "raw" / name, say=lambda _: None)
        write(name, root / "raw" / name, root / name, allow_mismatch=True, workers=1)
    return root


@pytest.mark.parametrize("name", FORMATS)
def test_every_person_gets_the_attributes_of_its_own_drawing(name: str, trees: Path) -> None:
    assert write_attributes(trees / "raw" / name, trees / name) == 5
    shards = ShardSet(trees / name)
    found = read_attributes(shards)
    spec = ExportSpec(name, WORLD, 2, 3, 0, 2, 0.4)
    for number, split, index in spec.people():
        person = spec.world.identity(split, index)
        raw = f"{number + FORMATS[name]:04d}" if name == "market1501" else str(number + FORMATS[name])
        assert found[f"{name}:{raw}"] == effective(person.attributes)
        # The pictures of this identity are those that were drawn of that person.
        pid = shards.identities.index(f"{name}:{raw}")
        sources = {shards.sample(row).source for row in range(len(shards)) if shards.index["pid"][row] == pid}
        shots = json.loads((trees / "raw" / name / "world.json").read_text())["shots"]
        assert sources and all(any(source.endswith(path) for path in shots) for source in sources)
    rows = range(len(shards))
    strangers = {shards.sample(row).pid for row in rows if shards.sample(row).role in ("distractor", "junk")}
    assert not strangers & set(found)


def test_the_command_says_what_it_wrote(trees: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attributes", str(trees / "raw" / "market1501"), str(trees / "market1501")]) == 0
    assert "attributes.json: attributes of 5 people" in capsys.readouterr().out
    assert main(["attributes", str(trees / "nowhere"), str(trees / "market1501")]) == 2
    assert "world.json: cannot be read" in capsys.readouterr().err


def test_another_tree_is_refused(trees: Path, tmp_path: Path) -> None:
    export(ExportSpec("cuhk_pedes", WORLD, 4, 3, 0, 2, 0.4), tmp_path / "other", say=lambda _: None)
    with pytest.raises(UserError, match=r"cuhk_pedes:3 is in split test, but not in"):
        write_attributes(tmp_path / "other", trees / "cuhk_pedes")
    export(ExportSpec("msmt17", WORLD, 2, 3, 0, 2, 0.4), tmp_path / "msmt17", say=lambda _: None)
    with pytest.raises(UserError, match="a msmt17 tree does not number its people"):
        write_attributes(tmp_path / "msmt17", trees / "cuhk_pedes")
