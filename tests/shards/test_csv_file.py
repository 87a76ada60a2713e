"""One's own data as csv."""

from collections.abc import Callable
from pathlib import Path

import pytest

from reid_dist.errors import UserError
from shards import csv_file
from shards.raw import Counts, RawSample, count_parts

TABLE = '''\
pid,path,camid,split,role,caption,caption2
7,in/a.jpg,0,train,,"a man, walking","he says ""hi"""
7,in/b.jpg,3,,,,
8,c.jpg,,test,query," a
woman ",
8,./c.jpg,,test,query,again,and again
,in/d.jpg,-1,val,distractor,,
'''


@pytest.fixture
def root(tmp_path: Path, draw_at: Callable[[Path, int], None]) -> Path:
    root = tmp_path / "own"
    for number, name in enumerate(["in/a.jpg", "in/b.jpg", "c.jpg", "in/d.jpg", "e.jpg"]):
        draw_at(root / name, number)
    (root / "people.csv").write_text(TABLE)
    return root


def read(root: Path) -> list[RawSample]:
    return list(csv_file.samples(root, "standard"))


def test_samples(root: Path) -> None:
    assert [(s.source, s.pid, s.camid, s.split, s.role, s.captions) for s in read(root)] == [
        ("in/a.jpg", "7", 0, "train", "train", ("a man, walking", 'he says "hi"')),
        ("in/b.jpg", "7", 3, "train", "train", ()),
        ("c.jpg", "8", -1, "test", "query", ("a\nwoman", "again", "and again")),
        ("in/d.jpg", None, -1, "val", "distractor", ()),
    ]
    assert count_parts(read(root), csv_file)["train"] == Counts(1, 2, 2, 2)


def test_only_paths_and_captions_from_a_spreadsheet(root: Path) -> None:
    (root / "people.csv").write_bytes(b"\xef\xbb\xbfpath,caption1\r\nin/a.jpg,\xc3\xa4\r\n\r\nc.jpg,b\r\n")
    assert [(s.pid, s.captions, s.split) for s in read(root)] == [(None, ("ä",), "train"), (None, ("b",), "train")]


def test_train_and_val_may_share_people(root: Path) -> None:
    (root / "people.csv").write_text("path,pid,split\nc.jpg,1,train\nin/a.jpg,1,val\n")
    assert [sample.role for sample in read(root)] == ["train", "gallery"]


def test_several_tables(root: Path) -> None:
    (root / "more.csv").write_text("path,pid\ne.jpg,9\n")
    assert [sample.source for sample in read(root)] == ["e.jpg", "in/a.jpg", "in/b.jpg", "c.jpg", "in/d.jpg"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("path,pidd\na,1\n", r"line 1: unknown column 'pidd'; did you mean pid\? There are path, pid"),
        ("path,captions\n", "line 1: unknown column 'captions'; did you mean caption"),
        ("path;pid\n", "line 1: unknown column 'path;pid'"),
        ("pid,camid\n1,2\n", "line 1: no column path"),
        ("", "line 1: no column path"),
        ("path,pid,pid\n", "line 1: the column 'pid' occurs twice"),
        ("path,pid\nc.jpg\n", "line 2: 1 cells instead of 2"),
        ("path,caption\nc.jpg,a man, walking\n", "line 2: 3 cells instead of 2; quote cells"),
        ("path,pid\nc.jpg,1\n,2\n", "line 3: path: Field required"),
        ("path,camid\nc.jpg,one\n", "line 2: camid: .* integer"),
        ("path,camid\nc.jpg,1.5\n", "line 2: camid: .* integer"),
        ("path,camid\nc.jpg,-2\n", "line 2: camid: .* greater than or equal to -1"),
        ("path,camid\nc.jpg,9999999999\n", "line 2: camid: .* less than"),
        ("path,split\nc.jpg,dev\n", "line 2: split: Input should be 'train', 'val' or 'test'"),
        ("path,role\nc.jpg,boss\n", "line 2: role: "),
        ("path,role\nc.jpg,query\n", "line 2: the role query does not go with the split train"),
        ("path,split,role\nc.jpg,test,train\n", "line 2: the role train does not go with the split test"),
        ("path\n../c.jpg\n", r"line 2: '\.\./c\.jpg' is not a path inside"),
        ("path\n/etc/passwd\n", "line 2: '/etc/passwd' is not a path inside"),
        ("path\nin\\a.jpg\n", "line 2: .* is not a path inside"),
        ("path\nin/z.jpg\n", "line 2: .*z.jpg does not exist"),
        ("path\nin\n", "line 2: .*in does not exist"),
        ("path,pid\nc.jpg,1\nin/a.jpg,1\nc.jpg,2\n", "line 4: 'c.jpg' has another pid.* than in .*csv: line 2"),
        ("path,pid,split\nc.jpg,1,test\nin/a.jpg,1,val\n", "line 3: pid '1' is in val and, in .*csv: line 2, in test"),
        ('path,caption\nc.jpg,"no end\n', "line 2: unexpected end of data"),
        ('path,caption\nc.jpg,"a" b\n', "line 2: .*; correct its quotes and commas"),
        ("path,caption\nc.jpg," + "a" * 1_000_001, "line 2: more than 1000000 characters"),
    ],
)
def test_wrong_tables(root: Path, table: str, message: str) -> None:
    (root / "people.csv").write_text(table)
    with pytest.raises(UserError, match=message) as caught:
        read(root)
    assert str(root / "people.csv") in str(caught.value) and "\n" not in str(caught.value)


def test_other_files(root: Path, tmp_path: Path) -> None:
    (root / "people.csv").write_bytes(b"path,caption\nc.jpg,\xe4\n")
    with pytest.raises(UserError, match="not UTF-8"):
        read(root)
    (root / "people.csv").write_bytes(b"path\nc.jpg\0\n")
    with pytest.raises(UserError, match=r"people\.csv: line 2: "):
        read(root)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"none: holds no \*\.csv"):
        read(tmp_path / "none")
