"""The file of words and vectors: what goes in comes out, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from reid_dist.errors import UserError
from reid_dist.models.dictionary import FORMAT, Dictionary, read_dictionary, read_key, write_dictionary


def make(words: int = 4, width: int = 3, seed: int = 0) -> Dictionary:
    vectors_NW = torch.randn(words, width, generator=torch.Generator().manual_seed(seed))
    return Dictionary([f"word{i}" for i in range(words)], vectors_NW, "a test")


def test_it_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "words.safetensors"
    write_dictionary(path, make(), "some key")
    found = read_dictionary(path)
    assert found.words == make().words and found.vectors_NW.equal(make().vectors_NW) and found.source == "a test"
    assert read_key(path) == "some key" and [file.name for file in path.parent.iterdir()] == ["words.safetensors"]


def test_the_table_has_zeros_for_padding_and_unknown_words(tmp_path: Path) -> None:
    table_VW = make().table()
    assert table_VW.shape == (6, 3) and not table_VW[:2].any() and table_VW[2:].equal(make().vectors_NW)


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    digest = make().digest()
    write_dictionary(tmp_path / "a.safetensors", make(), "one")
    write_dictionary(tmp_path / "b.safetensors", make(), "other")
    assert {read_dictionary(tmp_path / f"{name}.safetensors").digest() for name in "ab"} == {digest}
    assert make(seed=1).digest() != digest
    assert Dictionary(["x", *make().words[1:]], make().vectors_NW).digest() != digest


def test_an_export_s_own_words_are_a_dictionary(tmp_path: Path) -> None:
    save_file({"text.words": make().table(), "visual.x": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "manifest.json").write_text(json.dumps({"words": make().words}))
    found = read_dictionary(tmp_path)
    assert found.words == make().words and found.vectors_NW.equal(make().vectors_NW)


def assert_refused(path: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        read_dictionary(path)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)


def test_a_file_that_is_not_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "words.safetensors"
    assert_refused(path, r"word_gru\.dictionary: .*cannot be read.*word_gru build")
    assert read_key(path) is None
    path.write_bytes(b"not tensors at all")
    assert_refused(path, "cannot be read")
    assert read_key(path) is None
    save_file({"vectors": torch.zeros(2, 3)}, path)
    assert_refused(path, "is no dictionary of words")
    assert read_key(path) is None


def test_a_folder_that_is_no_export_with_words_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path, "is no exported stage with a dictionary")
    save_file({"text.token_embedding.weight": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    (tmp_path / "manifest.json").write_text(json.dumps({"words": ["a"]}))
    assert_refused(tmp_path, "is no exported stage with a dictionary")
    save_file({"text.words": make().table()}, tmp_path / "model.safetensors")
    (tmp_path / "manifest.json").write_text(json.dumps({"words": None}))
    assert_refused(tmp_path, "0 words, but vectors")


@pytest.mark.parametrize(
    ("words", "vectors_NW", "message"),
    [
        (["a", "b"], torch.zeros(3, 2), r"2 words, but vectors of float32 \(3, 2\)"),
        (["a", "b"], torch.zeros(2), r"vectors of float32 \(2,\)"),
        (["a", "b"], torch.zeros(2, 2, dtype=torch.float16), "vectors of float16"),
        (["a", "a"], torch.zeros(2, 2), "a word stands twice"),
        (["a", "b"], torch.tensor([[0.0], [torch.nan]]), "nan or inf"),
    ],
)
def test_words_and_vectors_must_belong_together(words, vectors_NW, message: str, tmp_path: Path) -> None:
    path = tmp_path / "words.safetensors"
    save_file({"vectors": vectors_NW}, path, metadata={"format": FORMAT, "words": "\n".join(words)})
    assert_refused(path, message)
