"""Tiny raw trees in the data sets' own formats."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def draw(path: Path, number: int) -> None:
    """Write a small JPEG that depends on its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (12, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    path.write_bytes(buffer.getvalue())


@pytest.fixture
def draw_at() -> Callable[[Path, int], None]:
    """`draw`, for tests that make trees of their own."""
    return draw


@pytest.fixture
def cuhk(tmp_path: Path) -> Path:
    """Five identities with two images: three train, one val, one test; one image has three captions."""
    root = tmp_path / "CUHK-PEDES"
    entries = []
    for number in range(10):
        pid = number // 2 + 1
        name = f"cam_a/{number:03d}.jpg"
        draw(root / "imgs" / name, number)
        captions = [f"person {pid} image {number}", "a caption, with é"] + ["third"] * (number == 0)
        split = "train" if pid <= 3 else "val" if pid == 4 else "test"
        entries.append(
            {"split": split, "captions": captions, "file_path": name, "processed_tokens": [["a"]], "id": pid}
        )
    (root / "reid_raw.json").write_text(json.dumps(entries))
    return root


@pytest.fixture
def market(tmp_path: Path) -> Path:
    """Two training and two test identities, a distractor, a junk image and the files found beside images."""
    root = tmp_path / "run-2_c1" / "Market"
    names = {
        "bounding_box_train": [
            "0002_c1s1_000451_03.jpg",
            "0002_c3s1_000551_01.jpg",
            "0007_c6s3_077419_03.jpg",
        ],
        "query": ["0001_c1s1_001051_00.jpg", "1500_c2s1_000301_00.jpg"],
        "bounding_box_test": [
            "0001_c2s1_000301_00.jpg",
            "1500_c5s1_000301_00.jpg.jpg",
            "0000_c4s6_018816_04.jpg",
            "-1_c1s1_000401_03.jpg",
        ],
    }
    for folder, files in names.items():
        for name in files:
            draw(root / folder / name, sum(name.encode()))
        (root / folder / "Thumbs.db").write_bytes(b"x")
    return root


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Three pairs in two folders, one failed row and the files that img2dataset writes beside its folders."""
    root = tmp_path / "pairs"
    for number, key in enumerate(["00000/000000000", "00000/000000002", "00001/000010000"]):
        draw(root / f"{key}.jpg", number)
        facts = {"caption": f"scene {number}", "url": "http://x", "key": key[-9:], "status": "success"}
        (root / f"{key}.json").write_text(json.dumps(facts))
        if number != 1:
            (root / f"{key}.txt").write_text(f"scene {number}\n")
    draw(root / "00001/000010001.jpg", 9)
    (root / "00001/000010001.json").write_text(json.dumps({"status": "failed_to_resize", "caption": None}))
    (root / "00000_stats.json").write_text("{}")
    (root / "00000.parquet").write_bytes(b"x")
    return root
