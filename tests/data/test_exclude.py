"""Reading lists of identities that must not be trained on."""

from pathlib import Path

import pytest

from reid_dist.data.exclude import read_exclusions
from reid_dist.errors import UserError


def _read(path: Path, content: bytes) -> frozenset[str]:
    path.write_bytes(content)
    return read_exclusions(path)


def test_identities_comments_and_blank_lines(tmp_path: Path) -> None:
    content = "# made by hand\n\n  # indented\ncuhk_pedes:12\nmarket1501:0002 \r\na-b:x:y#1\ncuhk_pedes:12\nset:é"
    expected = {"cuhk_pedes:12", "market1501:0002", "a-b:x:y#1", "set:é"}
    assert _read(tmp_path / "exclude.txt", content.encode()) == expected


@pytest.mark.parametrize("content", [b"", b"# only a head\n", b"\n \n"])
def test_lists_may_be_empty(tmp_path: Path, content: bytes) -> None:
    assert _read(tmp_path / "exclude.txt", content) == frozenset()


@pytest.mark.parametrize("line", ["12", "a:1 b:2", "a: 1", "a :1", "a:", ":1", "a:1 # why", "a/b:1", "a:1,a:2 x"])
def test_anything_else_is_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(UserError) as caught:
        _read(tmp_path / "exclude.txt", f"# head\na:1\n{line}\n".encode())
    message = str(caught.value)
    assert message.startswith(f'{tmp_path / "exclude.txt"}: line 3 "{line}" is not an identity')
    assert "\n" not in message


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
    assert f"`python -m shards.overlap --train DIR... --eval DIR... --out {path}`" in message
