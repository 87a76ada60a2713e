"""The copy in host memory."""

import pytest
import torch

from reid_dist.checkpoint.manifest import TensorRecord
from reid_dist.checkpoint.private import Private, private_sha256
from reid_dist.checkpoint.snapshot import HostMemory, take_snapshot
from reid_dist.pieces import Piece


def test_what_changes_later_is_not_in_it() -> None:
    x, rng = torch.arange(10.0), torch.arange(3, dtype=torch.uint8)
    values = {"position": [1]}
    snapshot = take_snapshot([Piece("weights", "a", x, 10)], Private({"rng": rng}, values), HostMemory())
    x.zero_()
    rng.zero_()
    values["position"].append(2)
    assert snapshot.keyed()["weights/a@0"].tolist() == list(range(10))
    assert snapshot.keyed()["private/rng"].tolist() == [0, 1, 2]
    assert snapshot.values == b'{"position": [1]}'


def test_memory_is_used_again_and_grows_for_what_is_large() -> None:
    memory = HostMemory()
    large = torch.randn(1 << 22).bfloat16().repeat(10)  # 84 MB: above a slab
    addresses = []
    for _ in range(2):
        memory.clear()
        copies = [memory.copy(x) for x in (torch.randn(5), torch.tensor([True]), large, torch.randn(3, 4).T)]
        addresses.append([x.data_ptr() for x in copies])
        assert torch.equal(copies[2], large)
        assert all(x.is_contiguous() and x.data_ptr() % 64 == 0 for x in copies)
    assert addresses[0] == addresses[1]
    assert len(set(addresses[0])) == 4


def test_a_part_of_a_tensor_is_copied_whole_in_its_order() -> None:
    x = torch.arange(24).reshape(4, 6).T[1::2]
    assert torch.equal(HostMemory().copy(x), x)


def test_the_table_tells_dtype_row_and_shape() -> None:
    queue = Piece("queue", "image", torch.zeros(3, 4).bfloat16(), 6, 1, 2)
    scale = Piece("weights", "scale", torch.ones(1), 1)
    none = Piece("weights", "empty", torch.empty(0, 4), 0, shape=(0, 4))
    table = take_snapshot([queue, scale, none], Private(), HostMemory()).table(1)
    record = TensorRecord.model_validate(table["queue", "image"])
    assert record == TensorRecord(dtype="BF16", total=6, row=[4], shape=[6, 4], pieces=[(1, 1, 2, 3)])
    assert table["weights", "scale"]["shape"] == []
    assert table["weights", "empty"]["pieces"] == [] and table["weights", "empty"]["shape"] == [0, 4]


def test_values_without_a_json_form_are_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        take_snapshot([], Private({}, {"loss": float("nan")}), HostMemory())


def test_the_hash_of_private_state_tells_values_names_and_bytes() -> None:
    first = Private({"a": torch.tensor([1, 2])}, {"x": 1})
    others = [
        Private({"a": torch.tensor([1, 3])}, {"x": 1}),
        Private({"b": torch.tensor([1, 2])}, {"x": 1}),
        Private({"a": torch.tensor([1, 2], dtype=torch.int32)}, {"x": 1}),
        Private({"a": torch.tensor([1, 2])}, {"x": 2}),
    ]
    assert len({private_sha256(private) for private in [first, *others]}) == 5
    assert private_sha256(first) == private_sha256(Private({"a": torch.tensor([1, 2])}, {"x": 1}))
