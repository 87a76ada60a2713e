"""Weight files that are damaged, of something else, or meant to run code: refused in one line, nothing runs."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from reid_dist.config import ModelConfig
from reid_dist.errors import UserError
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.models.weights import read_state_dict


def weights_of(architecture: str) -> dict[str, Tensor]:
    return dict(build_dual_encoder(ModelConfig(architecture=architecture, image_size=(64, 64))).state_dict())


class Payload:
    """What a malicious file does when unpickled: it leaves a mark."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("how", ["pickle", "torch", "legacy", "beside tensors", "named safetensors"])
def test_a_pickled_object_is_refused_without_running_it(
    how: str, architectures: dict[str, str], tmp_path: Path
) -> None:
    marker = tmp_path / "executed"
    path = tmp_path / ("evil.safetensors" if how == "named safetensors" else "evil.pt")
    state = {
        "state_dict": weights_of(architectures["vit"]),
        "optimizer": Payload(marker),
    }
    if how in ("pickle", "named safetensors"):
        path.write_bytes(pickle.dumps(Payload(marker)))
    elif how == "torch":
        torch.save({"visual.proj": Payload(marker)}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=how != "legacy")
    with pytest.raises(UserError, match="evil"):
        read_state_dict(path)
    assert not marker.exists()
    if how != "named safetensors":
        torch.load(path, weights_only=False) if how != "pickle" else pickle.loads(path.read_bytes())
        assert marker.exists(), "this test's payload would not have run anyway"


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04", bytes(64)])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_damaged_file_is_told(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.weights.*damaged"):
        read_state_dict(path)


def test_a_truncated_file_is_told(architectures: dict[str, str], tmp_path: Path) -> None:
    for name, save in (("cut.pt", torch.save), ("cut.safetensors", save_file)):
        save(weights_of(architectures["vit"]), tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-500])
        with pytest.raises(UserError, match="cut"):
            read_state_dict(tmp_path / name)


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, {0: torch.zeros(1)}, {"state_dict": 3}, torch.zeros(2)])
def test_a_file_of_something_else_is_told(value: Any, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "else.pt")
    with pytest.raises(UserError, match=r"else\.pt is not a state dict"):
        read_state_dict(tmp_path / "else.pt")


def test_a_missing_file_and_an_empty_folder_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.pt does not exist"):
        read_state_dict(tmp_path / "absent.pt")
    with pytest.raises(UserError, match=r"model\.safetensors does not exist"):
        read_state_dict(tmp_path)
