"""What `shards.verify` counts and calls no damage: duplicate images and captions, and captions that are cut."""

from pathlib import Path

import numpy as np
import pytest

from reid_dist.data.sample import Sample
from shards.checking.captions import TokenizerChoice, count_captions, shared_mask
from shards.checking.shard_set import verify_set
from shards.index import ShardWriter
from shards.verify import main
from tests.hostile_tars import jpeg, record

COUNT = 12


def test_duplicates_are_reported_and_no_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "twins"
    folder.mkdir()
    writer = ShardWriter(folder, "tiny")
    # number, image, split: image 1 is there twice for one person, 2 for two people, 3 is trained on and tested.
    for number, image, split in [(0, 1, "train"), (1, 1, "train"), (2, 2, "train"), (4, 2, "train"), (6, 3, "train"),
                                 (8, 3, "test"), (9, 4, "test"), (10, 5, "test"), (12, 6, "test")]:  # fmt: skip
        role = "train" if split == "train" else "gallery"
        captions = ["A  man walks.", f"person {number}"] if split == "test" and number != 9 else [f"a {number}"]
        data = record(number, jpeg(image), split=split, role=role, captions=captions)
        writer.add(f"s{number}", Sample.model_validate_json(data), jpeg(image))
    writer.finish({})
    assert main([str(folder)]) == 0
    report = verify_set(folder)
    assert report.duplicates == {"copies": 3, "identities": 4, "splits": 2}
    test = report.captions["test"]
    # Three people have the same sentence; one of the three queries can be right.
    assert (test.captions, test.distinct, test.shared) == (7, 5, 3)
    assert test.ceiling == pytest.approx(5 / 7)
    printed = capsys.readouterr().out
    assert "3 copies beyond the first; 4 images stand under several identities, 2 in the training and" in printed
    assert "3 shared by several identities, a ceiling of 71.43% on R@1" in printed


def test_caption_counts_against_a_plain_count() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        count = int(rng.integers(1, 40))
        digests, pids = rng.integers(0, 9, count).astype(np.uint64), rng.integers(0, 5, count)
        words = rng.integers(0, 50, count)
        found = count_captions(digests, pids, words)
        pairs = list(zip(digests.tolist(), pids.tolist(), strict=True))
        people = {digest: [pid for each, pid in pairs if each == digest] for digest, _ in pairs}
        assert found.captions == count and found.distinct == len(people)
        assert found.shared == sum(len(each) for each in people.values() if len(set(each)) > 1)
        right = sum(max(each.count(pid) for pid in each) for each in people.values())
        assert found.ceiling == pytest.approx(right / count)
        assert (found.words_least, found.words_most) == (words.min(), words.max())
        assert shared_mask(digests, pids).tolist() == [len(set(people[digest])) > 1 for digest, _ in pairs]
    assert shared_mask(np.zeros(0, np.uint64), np.zeros(0, np.int64)).tolist() == []


def test_cut_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = ["one two three", "one two three four", "one, two; three four five", ""]
    folder = tmp_path / "tiny"
    folder.mkdir()
    writer = ShardWriter(folder, "tiny")
    for number in range(COUNT):
        writer.add(
            f"s{number}", Sample.model_validate_json(record(number, jpeg(number), captions=captions)), jpeg(number)
        )
    writer.finish({})
    vocabulary = tmp_path / "words.txt"
    vocabulary.write_text("one\ntwo\n")
    assert main([str(folder), "--vocabulary", str(vocabulary), "--context-length", "6"]) == 0
    assert f"captions that the tokenizer cuts: {COUNT} of {4 * COUNT} (25.00%)" in capsys.readouterr().out
    # CLIP's: a token for each of these words and for each mark.
    found = verify_set(folder, TokenizerChoice("", "ViT-B-16", 6), workers=1)
    assert found.cut == COUNT
    assert verify_set(folder, TokenizerChoice("", "ViT-B-16", 5)).cut == 2 * COUNT
