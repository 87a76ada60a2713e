"""What is counted of captions: lengths, cuts by the tokenizer, and sentences that several people share."""

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from reid_dist.data.tokenizer import FIRST_WORD, Tokenizer, WordTokenizer, build_tokenizer, read_vocabulary
from reid_dist.errors import UserError

_ANY_VOCABULARY = 1 << 31


class TokenizerChoice(NamedTuple):
    """Which tokenizer's cuts are counted; small, so that every process makes its own.

    Attributes:
        vocabulary: word list; empty: open_clip's tokenizer of `name`.
        name: an open_clip architecture.
        context_length: tokens, start and end included.
    """

    vocabulary: str
    name: str
    context_length: int


@functools.lru_cache(maxsize=1)
def make_tokenizer(choice: TokenizerChoice) -> Tokenizer:
    """The tokenizer of a choice.

    Raises:
        UserError: no such vocabulary or architecture, or its files cannot be got.
    """
    if choice.vocabulary:
        words = read_vocabulary(choice.vocabulary)
        return WordTokenizer(words, choice.context_length, len(words) + FIRST_WORD + 1)
    import open_clip  # here: the import takes seconds, and a word list does not need it

    if choice.name not in open_clip.list_models():
        raise UserError(f"--tokenizer {choice.name}: open_clip has no such architecture; take ViT-B-16 for CLIP's")
    try:
        return build_tokenizer(None, choice.name, choice.context_length, _ANY_VOCABULARY)
    except Exception as error:  # the hub's own exceptions, when files must be downloaded first
        reason = str(error).split("\n", 1)[0]
        raise UserError(f"--tokenizer {choice.name}: cannot be made ({reason}); take ViT-B-16 for CLIP's") from None


class CaptionCounts(NamedTuple):
    """What the captions of one split are like.

    Attributes:
        captions: their number.
        distinct: those that differ in more than case and white space.
        shared: captions that another identity has as well.
        ceiling: greatest share (0 to 1) of queries that can find their person at rank 1, since equal sentences get
            equal rankings; 1.0 where no identities share one.
        words_least: of a caption.
        words_mean: of a caption.
        words_most: of a caption.
    """

    captions: int
    distinct: int
    shared: int
    ceiling: float
    words_least: int
    words_mean: float
    words_most: int


def count_captions(
    digest_M: npt.NDArray[np.uint64], pid_M: npt.NDArray[np.int64], words_M: npt.NDArray[np.int64]
) -> CaptionCounts:
    """Counts of M > 0 captions, by the digest of each sentence, its identity and its number of words."""
    count = len(digest_M)
    order = np.lexsort((pid_M, digest_M))
    digests, pids = digest_M[order], pid_M[order]
    sentence = np.ones(count, dtype=bool)
    sentence[1:] = digests[1:] != digests[:-1]
    person = sentence.copy()
    person[1:] |= pids[1:] != pids[:-1]
    starts = np.flatnonzero(person)
    each = np.diff(starts, append=count)
    best = np.maximum.reduceat(each, np.flatnonzero(sentence[starts]))
    return CaptionCounts(
        captions=count,
        distinct=int(sentence.sum()),
        shared=int(shared_mask(digest_M, pid_M).sum()),
        ceiling=float(best.sum() / count),
        words_least=int(words_M.min()),
        words_mean=float(words_M.mean()),
        words_most=int(words_M.max()),
    )


def shared_mask(digest_N: npt.NDArray[np.uint64], group_N: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which of N contents occur in more than one group."""
    if not len(digest_N):
        return np.zeros(0, dtype=bool)
    _, number_N = np.unique(digest_N, return_inverse=True)
    order = np.argsort(number_N, kind="stable")
    starts = np.flatnonzero(np.diff(number_N[order], prepend=-1))
    sorted_groups = group_N[order]
    several = np.minimum.reduceat(sorted_groups, starts) != np.maximum.reduceat(sorted_groups, starts)
    mask: npt.NDArray[np.bool_] = several[number_N]
    return mask
