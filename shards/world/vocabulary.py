"""Words of captions, and how much of one tree's vocabulary another tree covers."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from reid_dist.errors import UserError


def words_of(text: str) -> list[str]:
    """Return the lower-case words of a caption."""
    return re.findall(r"[a-z0-9-]+", text.lower())


@dataclass(frozen=True)
class Coverage:
    """How much of a target's language a corpus knows.

    Attributes:
        words: Distinct words of the target.
        occurrences: All words of the target, repeated ones counted each time.
        missing: Words of the target that the corpus never uses, the most frequent first, with their occurrences.
        rarest: The word of the target that the corpus uses least often, and how often (at least once).
    """

    words: int
    occurrences: int
    missing: dict[str, int]
    rarest: tuple[str, int]

    @property
    def word_share(self) -> float:
        """Percentage of the distinct words that the corpus uses."""
        return 100.0 * (1 - len(self.missing) / self.words)

    @property
    def occurrence_share(self) -> float:
        """Percentage of all words of the target that the corpus uses."""
        return 100.0 * (1 - sum(self.missing.values()) / self.occurrences)


def tree_words(root: Path) -> Counter[str]:
    """Return how often a tree's captions use each word (CUHK-PEDES or img2dataset layout).

    Raises:
        UserError: The tree holds no captions.
    """
    listed = root / "reid_raw.json"
    if listed.is_file():
        try:
            texts = [text for entry in json.loads(listed.read_text(encoding="utf-8")) for text in entry["captions"]]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{listed}: cannot be read; export the tree again") from None
    else:
        texts = [_text_of(path) for path in sorted(root.glob("*/*.txt"))]
    words = Counter(word for text in texts for word in words_of(text))
    if not words:
        raise UserError(f"{root}: holds no captions (neither reid_raw.json nor */*.txt); export the tree again")
    return words


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; export the tree again") from None


def coverage_of(corpus: Path, target: Path) -> Coverage:
    """Return how much of the target's words the corpus uses.

    Args:
        corpus: Tree to learn words from, for example an img2dataset export.
        target: Tree whose words are asked for, for example a CUHK-PEDES export.
    """
    known, wanted = tree_words(corpus), tree_words(target)
    missing = {word: count for word, count in wanted.most_common() if word not in known}
    shared = [(known[word], word) for word in wanted if word in known]
    count, word = min(shared, default=(0, ""))
    return Coverage(len(wanted), sum(wanted.values()), missing, (word, count))
