"""Files that are written and hashed in one pass."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reid_dist.checkpoint.tensor_file import DTYPES, write_blocks, write_tensors
from reid_dist.files import content_sha256


def test_the_library_reads_every_dtype_back(tmp_path: Path) -> None:
    tensors = {f"part/{name}@0": torch.randn(3, 5).mul(50).to(dtype) for dtype, name in DTYPES.items()}
    tensors["odd"] = torch.ones(3, dtype=torch.uint8)  # what follows must still begin where its elements do
    tensors["none"] = torch.empty(0, 4)
    tensors["scalar"] = torch.tensor(2.5)
    record = write_tensors(tmp_path / "a.safetensors", tensors)
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == x.dtype and torch.equal(found[name], x) for name, x in tensors.items())
    assert record.sha256 == content_sha256(tmp_path / "a.safetensors")
    assert record.size == (tmp_path / "a.safetensors").stat().st_size


def test_larger_than_a_block(tmp_path: Path) -> None:
    x = torch.randn(700_001)
    record = write_tensors(tmp_path / "a", {"x": x})
    assert torch.equal(load_file(tmp_path / "a")["x"], x)
    assert record.sha256 == content_sha256(tmp_path / "a")


def test_only_the_owner_reads_it(tmp_path: Path) -> None:
    write_blocks(tmp_path / "a", [b"x"])
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600


def test_a_dtype_without_a_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x: torch\.complex64"):
        write_tensors(tmp_path / "a", {"x": torch.ones(1, dtype=torch.complex64)})


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_told_with_the_path() -> None:
    with pytest.raises(OSError, match="/dev/full") as raised:
        write_blocks(Path("/dev/full"), [b"x" * 10])
    assert raised.value.errno == errno.ENOSPC


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "a").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic link"):
        write_blocks(tmp_path / "a", [b"x"])
    assert (tmp_path / "victim").read_text() == "precious"
