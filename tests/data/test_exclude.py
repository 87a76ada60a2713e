"""Lists of what must not be trained on: reading them, and which rows they leave."""

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from reid_dist.data.exclude import COMPARED, NOTHING, Exclusions, read_exclusions
from reid_dist.data.reader import ShardSet
from reid_dist.errors import UserError

IMAGE = hashlib.sha256(b"an image").hexdigest()


def _read(path: Path, content: bytes) -> Exclusions:
    path.write_bytes(content)
    return read_exclusions(path)


def test_identities_images_comments_and_blank_lines(tmp_path: Path) -> None:
    content = (
        "\ufeff# made by hand\n\n  # indented\ncuhk_pedes:12\nmarket1501:0002 \r\na-b:x:y#1\ncuhk_pedes:12\n"
        f"sha256:{IMAGE.upper()}\nsha256:{IMAGE}\nx:sha256:{IMAGE}\nset:é"
    )
    read = _read(tmp_path / "exclude.txt", content.encode())
    assert read.pids == {"cuhk_pedes:12", "market1501:0002", "a-b:x:y#1", "set:é", f"x:sha256:{IMAGE}"}
    assert read.images == {IMAGE} and read


@pytest.mark.parametrize("content", [b"", b"# only a head\n", b"\n \n"])
def test_lists_may_be_empty(tmp_path: Path, content: bytes) -> None:
    read = _read(tmp_path / "exclude.txt", content)
    assert read == NOTHING and not read


def test_sets_that_a_list_was_made_of(tmp_path: Path) -> None:
    one, two = "1" * 64, "f" * 64
    content = (
        f"# head\n{COMPARED.format('one', one)}\r\n  # compared: a-b_2 {two}\na:1\n"
        # An index without a hash, and lines of people: remarks like any other.
        f"# compared: three \n# compared: four {'2' * 63}\n# compared: five {'3' * 64} too\n"
        f"# compared: six {'A' * 64}\n# compared: a b {'4' * 64}\n## compared: seven {'5' * 64}\n# {'6' * 64}\n"
    )
    read = _read(tmp_path / "exclude.txt", content.encode())
    assert read.compared == {one, two} and read.pids == {"a:1"}
    # What a list speaks for leaves nothing out by itself.
    assert not Exclusions(compared=read.compared) and read == Exclusions(read.pids)
    assert pickle.loads(pickle.dumps(read)).compared == read.compared


@pytest.mark.parametrize(
    "line",
    [
        *("12", "a:1 b:2", "a: 1", "a :1", "a:", ":1", "a:1 # why", "a/b:1", "a:1,a:2 x"),
        *("sha256:", "sha256:12", f"sha256:{IMAGE}0", f"sha256:{IMAGE[1:]}g", f"sha256: {IMAGE}", IMAGE),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(UserError) as caught:
        _read(tmp_path / "exclude.txt", f"# head\na:1\n{line}\n".encode())
    message = str(caught.value)
    assert message.startswith(f'{tmp_path / "exclude.txt"}: line 3 "{line[:60]}" is neither an identity nor an image; ')
    assert '"dataset:raw id" or "sha256:<64 hex digits>"' in message and "\n" not in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file or directory"), (b"a:\xff", "not UTF-8 text")],
    ids=["missing", "bytes"],
)
def test_unreadable_file_names_the_command(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "exclude.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_exclusions(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and f"({reason})" in message and "\n" not in message
    assert f"`python -m shards.verify --overlap DIR... --out {path}`" in message


def test_rows_that_are_kept(build: Callable[..., Path]) -> None:
    shards = ShardSet(build("tiny", train=4))
    rows = np.random.default_rng(5).permutation(len(shards))[:17].astype(np.int64)
    pids = frozenset({"tiny:1", "tiny:3", "other:2", "tiny:77"})
    images = frozenset({hashlib.sha256(shards.image_bytes(row)).hexdigest() for row in (0, 7, 13)} | {"f" * 64})
    for exclusions in (NOTHING, Exclusions(pids), Exclusions(images=images), Exclusions(pids, images)):
        expected = [
            row
            for row in rows.tolist()
            if shards.sample(row).pid not in exclusions.pids
            and hashlib.sha256(shards.image_bytes(row)).hexdigest() not in exclusions.images
        ]
        for same in (exclusions, pickle.loads(pickle.dumps(exclusions))):
            kept = same.keeps(shards, rows)
            assert kept.tolist() == expected and kept.dtype == np.int64
    assert NOTHING.keeps(shards, rows[:0]).tolist() == []
