"""Sentences to token ids: a word list of our own, or the tokenizer that belongs to an open_clip model.

`python -m reid_dist.data.tokenizer build SHARDS... --out vocabulary.txt` makes the word list from training captions.

`mask_words` hides words of a sentence for masked language modelling.

Legend: N sentences, L context length.
"""

import argparse
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from reid_dist.data.reader import ShardSet
from reid_dist.errors import UserError

PAD, UNKNOWN, START, FIRST_WORD = 0, 1, 2, 3
# What torch's cross entropy leaves out.
NO_LABEL = -100

IntArray = npt.NDArray[np.int64]
MaskForm = Literal["words", "tokens"]

_WORD = re.compile(r"[a-z0-9]+")


class Tokenizer(Protocol):
    """What the loaders need of a tokenizer.

    Attributes:
        context_length: L.
        vocab_size: ids are below it.
        mask_id: stands for a hidden word, see `mask_words`; -1 when words cannot be hidden.
        word_ids: first id and one after the last that belong to words, from which a wrong one is drawn.
    """

    context_length: int
    vocab_size: int
    mask_id: int
    word_ids: tuple[int, int]

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Token ids, int64, 0 after the end. Shape: (N, L)."""

    def truncated_share(self, texts: Sequence[str]) -> float:
        """Share of the sentences (0 to 1) that lose words to the context length."""

    def word_numbers(self, token_L: IntArray) -> IntArray:
        """Which word each token belongs to, ascending numbers; -1: none that may be hidden. Shape: (L,)."""

    def spell(self, tokens: Sequence[int]) -> str:
        """The word that these tokens of its are."""


class WordTokenizer:
    """Lower-case words of a fixed list.

    Ids: 0 pad, 1 unknown word, 2 start, 3... the words in file order, vocab_size - 1 end of text: the greatest id, so
    that open_clip's argmax pooling finds it. A sentence that is too long keeps its first words and the end token.
    The unknown word also is the mask: a word that is hidden and one that is not in the list look alike to the model.

    Not framed, a sentence is its words alone, as TextReID's text tower reads it: 0 pad, 1 unknown word, 2... the words.

    Args:
        words: the vocabulary, without repetitions.
        context_length: L, at least 3.
        vocab_size: rows of the model's token embedding.
        framed: a start token before the words and an end token behind them.

    Raises:
        UserError: the words do not fit into `vocab_size`.
    """

    def __init__(self, words: Sequence[str], context_length: int, vocab_size: int, framed: bool = True) -> None:
        first = FIRST_WORD if framed else UNKNOWN + 1
        needed = len(words) + first + framed
        if needed > vocab_size:
            raise UserError(
                f"the vocabulary of {len(words)} words needs vocab_size >= {needed}, not {vocab_size}; "
                f"raise it in the model's text_cfg or build the vocabulary with a greater --min-count"
            )
        if context_length < 3:
            raise UserError(f"context_length {context_length}: start, one word and end need at least 3")
        self.words = list(words)
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.end = vocab_size - 1
        self.mask_id = UNKNOWN
        self.word_ids = (first, first + len(words))
        self._framed, self._room = framed, context_length - 2 * framed
        self._ids = {word: first + position for position, word in enumerate(words)}

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Token ids, int64. Shape: (N, L)."""
        return torch.tensor([self._row(text) for text in texts], dtype=torch.int64).reshape(-1, self.context_length)

    def truncated_share(self, texts: Sequence[str]) -> float:
        """Share of the sentences (0 to 1) with more words than there is room for: L - 2, or L where not framed."""
        long = sum(len(split_words(text)) > self._room for text in texts)
        return long / max(1, len(texts))

    def word_numbers(self, token_L: IntArray) -> IntArray:
        """A number for each word of the list, -1 for all other tokens. Shape: (L,)."""
        known_L = (token_L >= self.word_ids[0]) & (token_L < self.word_ids[1])
        return np.where(known_L, np.cumsum(known_L) - 1, -1)

    def spell(self, tokens: Sequence[int]) -> str:
        """The word of the list."""
        return " ".join(self.words[token - self.word_ids[0]] for token in tokens)

    def _row(self, text: str) -> list[int]:
        words = split_words(text)[: self._room]
        row = [self._ids.get(word, UNKNOWN) for word in words]
        row = [START, *row, self.end] if self._framed else row
        return row + [PAD] * (self.context_length - len(row))


class OpenClipTokenizer:
    """The tokenizer of an open_clip architecture, by name.

    Args:
        architecture: a name that open_clip knows; anything else (our JSON architectures) takes CLIP's own BPE.
        context_length: L.
        vocab_size: rows of the model's token embedding.

    Raises:
        UserError: the tokenizer has more tokens than the model's embedding.
    """

    def __init__(self, architecture: str, context_length: int, vocab_size: int) -> None:
        import open_clip  # here: the import takes seconds, and a word list does not need it

        known = architecture in open_clip.list_models()
        self._tokenizer: Any = (
            open_clip.get_tokenizer(architecture, context_length=context_length)
            if known
            else open_clip.SimpleTokenizer(context_length=context_length)
        )
        own = int(getattr(self._tokenizer, "vocab_size", 0) or len(getattr(self._tokenizer, "tokenizer", ())))
        if own > vocab_size:
            raise UserError(
                f"{architecture}: its tokenizer has {own} tokens, the model's vocab_size is {vocab_size}: "
                f"set vocab_size to {own} or give a vocabulary file"
            )
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.mask_id, self.word_ids = -1, (0, 0)
        self._last_piece: npt.NDArray[np.bool_] | None = None
        if isinstance(self._tokenizer, open_clip.SimpleTokenizer):
            # IRRA takes the last id before start and end for its mask; the word under it ("jekyll") is given up.
            self.mask_id = int(self._tokenizer.sot_token_id) - 1
            self.word_ids = (1, self.mask_id)
            pieces = self._tokenizer.decoder
            self._last_piece = np.array([pieces[number].endswith("</w>") for number in range(own)])

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Token ids, int64. Shape: (N, L)."""
        tokens: torch.Tensor = self._tokenizer(list(texts))
        return tokens.to(torch.int64)

    def truncated_share(self, texts: Sequence[str]) -> float:
        """Share of the sentences (0 to 1) that are cut at L tokens."""
        # One place more than L: a sentence that reaches it would have been cut.
        longer: torch.Tensor = self._tokenizer(list(texts), context_length=self.context_length + 1)
        return float((longer[:, -1] != 0).float().mean()) if len(texts) else 0.0

    def word_numbers(self, token_L: IntArray) -> IntArray:
        """A number for the pieces of each word, -1 for start, end, padding and the mask. Shape: (L,)."""
        assert self._last_piece is not None
        number_L = np.full(len(token_L), -1, dtype=np.int64)
        end = int(token_L.argmax())
        inner = token_L[1:end]
        number_L[1:end] = np.cumsum(self._last_piece[inner]) - self._last_piece[inner]
        number_L[token_L == self.mask_id] = -1
        return number_L

    def spell(self, tokens: Sequence[int]) -> str:
        """The word that its pieces make."""
        return str(self._tokenizer.decode(list(tokens))).strip()


def mask_words(
    tokenizer: Tokenizer, token_L: IntArray, rng: np.random.Generator, share: float = 0.15, form: MaskForm = "words"
) -> tuple[IntArray, IntArray]:
    """Hide words of a sentence, to be found again (Jiang & Ye, CVPR 2023; methods.md card A4).

    Each word is chosen with probability `share`, and at least one is. Of the chosen, 80 % become the mask token, 10 %
    random tokens, 10 % stay; all tokens of a word share its fate. Start, end, padding and words that the tokenizer
    does not know are never chosen. Form "tokens" is IRRA's code: each token goes by itself, in CLIP's tokenizer those
    with 0 < id < 49405, and where none is chosen the sentence's first is, and becomes the mask.

    Args:
        tokenizer: made the tokens.
        token_L: not changed. Shape: (L,).
        rng: see `transforms.sample_rng`; the same number of draws is made for every sentence.
        share: of the words, 0 to 1.
        form: what is hidden, whole words or single tokens.

    Returns:
        The tokens, and the labels: the old token where a word was chosen, NO_LABEL elsewhere (everywhere for a
        sentence without words). Both of shape (L,).

    Raises:
        UserError: the tokenizer has no mask token.
    """
    if tokenizer.mask_id < 0:
        raise UserError("this model's tokenizer has no mask token; give a vocabulary file or leave word masking off")
    low, high = tokenizer.word_ids
    number_L = tokenizer.word_numbers(token_L)
    if form == "tokens":
        number_L = np.where((token_L >= low) & (token_L < high), np.arange(len(token_L)), -1)
    draw_2L = rng.random((2, len(token_L)))
    wrong_L = rng.integers(low, max(high, low + 1), len(token_L))
    words, first = np.unique(number_L, return_index=True)
    words, first = words[words >= 0], first[words >= 0]
    masked_L, label_L = token_L.copy(), np.full_like(token_L, NO_LABEL)
    if not len(words):
        return masked_L, label_L
    # What becomes of a word is decided by the draws at its first token.
    chosen, fate = draw_2L[0, first] < share, draw_2L[1, first]
    if not chosen.any():
        least = int(draw_2L[0, first].argmin()) if form == "words" else 0
        chosen[least] = True
        fate[least] = fate[least] if form == "words" else 0.0
    word_L = np.searchsorted(words, np.maximum(number_L, words[0]))
    chosen_L, fate_L = (number_L >= 0) & chosen[word_L], fate[word_L]
    label_L[chosen_L] = token_L[chosen_L]
    masked_L[chosen_L & (fate_L < 0.8)] = tokenizer.mask_id
    random_L = chosen_L & (fate_L >= 0.8) & (fate_L < 0.9)
    masked_L[random_L] = wrong_L[random_L]
    return masked_L, label_L


def build_tokenizer(
    vocabulary: str | os.PathLike[str] | None, architecture: str, context_length: int, vocab_size: int
) -> Tokenizer:
    """The tokenizer of a run: the word list when a file is given, otherwise open_clip's.

    Args:
        vocabulary: file with one word per line, or None.
        architecture: open_clip model name; only read when `vocabulary` is None.
        context_length: L.
        vocab_size: rows of the model's token embedding.

    Raises:
        UserError: the file is missing or malformed, or the vocabulary does not fit the model.
    """
    if vocabulary is None:
        return OpenClipTokenizer(architecture, context_length, vocab_size)
    return WordTokenizer(read_vocabulary(vocabulary), context_length, vocab_size)


def split_words(text: str) -> list[str]:
    """Lower-case words of ASCII letters and digits; everything else separates."""
    return _WORD.findall(text.lower())


def read_vocabulary(path: str | os.PathLike[str]) -> list[str]:
    """The words of a vocabulary file, one per line.

    Raises:
        UserError: no such file, a line that is not one word, or a repeated word.
    """
    remedy = "build it with `python -m reid_dist.data.tokenizer build SHARDS... --out " + f"{os.fspath(path)}`"
    try:
        words = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the vocabulary cannot be read ({error}); {remedy}") from None
    seen: set[str] = set()
    for number, word in enumerate(words, start=1):
        if not _WORD.fullmatch(word) or word in seen:
            problem = "repeated" if word in seen else "not one lower-case word"
            raise UserError(f'{path}: line {number} "{word[:40]}" is {problem}; {remedy}')
        seen.add(word)
    return words


def count_words(shards: Iterable[ShardSet]) -> Counter[str]:
    """How often each word occurs in the captions of the training splits (never in those of val or test)."""
    counts: Counter[str] = Counter()
    for shard_set in shards:
        for row in shard_set.rows("train"):
            for caption in shard_set.sample(int(row)).captions:
                counts.update(split_words(caption))
    return counts


def write_vocabulary(counts: Counter[str], path: str | os.PathLike[str], min_count: int = 1) -> list[str]:
    """Write the words that occur at least `min_count` times, most frequent first, and return them.

    The file appears whole or not at all.
    """
    chosen = sorted((word for word in counts if counts[word] >= min_count), key=lambda word: (-counts[word], word))
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        os.fchmod(descriptor, 0o644)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.writelines(word + "\n" for word in chosen)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, 2 for wrong input."""
    parser = argparse.ArgumentParser(prog="python -m reid_dist.data.tokenizer", description=__doc__.splitlines()[0])
    build = parser.add_subparsers(required=True).add_parser("build", help="word list from training captions")
    build.add_argument("shards", nargs="+", type=Path, help="shard folders; only their training split is read")
    build.add_argument("--out", required=True, type=Path, help="vocabulary file to write")
    build.add_argument("--min-count", type=int, default=1, help="leave out words that are rarer than this")
    options = parser.parse_args(arguments)
    try:
        counts = count_words(ShardSet(path) for path in options.shards)
        if not counts:
            raise UserError(f"{', '.join(map(str, options.shards))}: no captions in the training split")
        words = write_vocabulary(counts, options.out, options.min_count)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rare = len(counts) - len(words)
    print(f"{options.out}: {len(words)} words, out of {counts.total()} in all ({rare} rarer ones left out)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
