"""Words of captions, and how much of one tree's vocabulary another tree covers."""

import json
import re
from pathlib import Path

from reid_dist.errors import UserError


def words_of(text: str) -> list[str]:
    """Return the lower-case words of a caption."""
    return re.findall(r"[a-z0-9-]+", text.lower())


def tree_words(root: Path) -> set[str]:
    """Return all words of a tree's captions (CUHK-PEDES or img2dataset layout).

    Raises:
        UserError: The tree holds no captions.
    """
    listed = root / "reid_raw.json"
    if listed.is_file():
        entries = json.loads(listed.read_text(encoding="utf-8"))
        texts = [text for entry in entries for text in entry["captions"]]
    else:
        texts = [path.read_text(encoding="utf-8") for path in sorted(root.glob("*/*.txt"))]
    if not texts:
        raise UserError(f"{root}: holds no captions (neither reid_raw.json nor */*.txt)")
    return {word for text in texts for word in words_of(text)}


def coverage_of(corpus: Path, target: Path) -> tuple[float, list[str], int]:
    """Return the percentage of the target's words that the corpus uses, the missing words, and their total."""
    known, wanted = tree_words(corpus), tree_words(target)
    missing = sorted(wanted - known)
    return 100.0 * (1 - len(missing) / len(wanted)), missing, len(wanted)
