"""TextReID's text tower: a vector for each word, a bidirectional GRU, the maximum over all words.

The vectors are learned with the tower, or a dictionary's, which `word_gru.py` builds from a text encoder.

Shape suffixes: B batch, L words, V vocabulary, W width of a word's vector, F features that enter the GRU, H hidden
size, D feature size.
"""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from reid_dist.config import ModelConfig
from reid_dist.errors import UserError
from reid_dist.models.dictionary import SPECIAL_ROWS, read_dictionary
from reid_dist.models.gru import OneWayGRU, reverse_words
from reid_dist.models.linear import new_linear
from reid_dist.models.tower import TowerOutput

PAD = 0


class WordGRU(nn.Module):
    """Words -> vectors -> bidirectional GRU -> maximum over the words -> linear map (Han et al. 2021; methods.md 3.3).

    The GRU has one layer, no biases and no dropout; the linear map has a bias. Padding after a caption reaches no state
    of its words. In the maximum it is left out (`masked`); or (`published`) it takes part as zeros, as in TextReID's
    code, yet for every caption below `context_length`: there it depends on the longest caption of the batch, here on
    the caption alone.

    Args:
        rows: V; id 0 is padding, whose vector is zero.
        output_dim: D.
        width: W; where it differs from `features`, a trained linear map stands between.
        features: F.
        hidden: H, of each direction.
        context_length: longest caption in words; what follows is cut off.
        padding: see above.
        train_words: false freezes the vectors.
    """

    gives_tokens = True

    def __init__(
        self,
        rows: int,
        output_dim: int,
        width: int = 512,
        features: int = 512,
        hidden: int = 512,
        context_length: int = 105,
        padding: Literal["masked", "published"] = "masked",
        train_words: bool = True,
    ) -> None:
        super().__init__()
        self.vocab_size, self.context_length, self.padding = rows, context_length, padding
        self.words = nn.Parameter(torch.randn(rows, width), requires_grad=train_words)
        with torch.no_grad():
            self.words[PAD] = 0
        self.word_map = new_linear(width, features) if width != features else None
        self.forward_gru, self.backward_gru = OneWayGRU(features, hidden), OneWayGRU(features, hidden)
        self.projection = new_linear(2 * hidden, output_dim)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Nothing to recompute: no blocks. The name is open_clip's, so all towers share it."""

    def forward(self, token_BL: Tensor, details: bool = False) -> Tensor | TowerOutput:
        """Features, or with `details` also those of each word (of padding: the bias alone). Shape: (B, L) -> (B, D)."""
        token_BL = token_BL[:, : self.context_length]
        is_word_BL1 = (token_BL != PAD)[:, :, None]
        states_BLH = self._states(token_BL, is_word_BL1.sum((1, 2)))
        features_BD: Tensor = self.projection(self._maximum(states_BLH, is_word_BL1))
        if not details:
            return features_BD
        return TowerOutput(features_BD, self.projection(states_BLH * is_word_BL1))

    def _states(self, token_BL: Tensor, length_B: Tensor) -> Tensor:
        """States of both directions beside each other. Shape: (B, L) -> (B, L, 2 H)."""
        x_BLF = nn.functional.embedding(token_BL, self.words)
        if self.word_map is not None:
            x_BLF = self.word_map(x_BLF)
        # As precise as the weights: a hundred steps add up what autocast would round in each.
        with torch.autocast(token_BL.device.type, enabled=False):
            forward_BLH: Tensor = self.forward_gru(x_BLF)
            backward_BLH: Tensor = self.backward_gru(reverse_words(x_BLF, length_B))
        return torch.cat([forward_BLH, reverse_words(backward_BLH, length_B)], dim=2)

    def _maximum(self, states_BLH: Tensor, is_word_BL1: Tensor) -> Tensor:
        """Shape: (B, L, 2 H) -> (B, 2 H). A caption without words gives zeros."""
        pooled_BH = states_BLH.masked_fill(~is_word_BL1, -torch.inf).amax(1)
        if self.padding == "published":
            is_short_B1 = is_word_BL1.sum(1) < self.context_length
            pooled_BH = torch.where(is_short_B1, pooled_BH.clamp_min(0), pooled_BH)
        return torch.where(is_word_BL1.any(1), pooled_BH, 0)


def build_word_tower(model: ModelConfig, features: int) -> WordGRU:
    """The tower of `model.word_gru`, with its dictionary's vectors or learned ones.

    On no device (`meta`), files that are not there are passed over where `word_gru.rows` tells the size of the table.

    Args:
        model: settings.
        features: D.

    Raises:
        UserError: the dictionary or the vocabulary cannot be read.
    """
    setting = model.word_gru
    if setting is None:
        raise ValueError("model.word_gru is not set")
    learned = setting.dictionary is None or setting.train_words
    sizes = (setting.features, setting.hidden, setting.context_length)
    path = model.vocabulary if setting.dictionary is None else setting.dictionary
    if path is None:
        raise ValueError("model.word_gru: words are learned without a vocabulary")
    if setting.rows is not None and torch.get_default_device().type == "meta" and not path.exists():
        return WordGRU(setting.rows, features, setting.features, *sizes, setting.padding, learned)
    if setting.dictionary is None:
        return WordGRU(_count_rows(path), features, setting.features, *sizes, setting.padding)
    table_VW = read_dictionary(path).table()
    tower = WordGRU(len(table_VW), features, table_VW.shape[1], *sizes, setting.padding, learned)
    if not tower.words.is_meta:
        with torch.no_grad():
            tower.words.copy_(table_VW)
    return tower


def _count_rows(vocabulary: Path) -> int:
    """Rows for the words of a file, one a line; the tokenizer, which reads them, tells what is wrong with a line."""
    try:
        return SPECIAL_ROWS + len(vocabulary.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"model.vocabulary: {vocabulary} cannot be read ({error}); build it with"
            " `python -m reid_dist.data.tokenizer build SHARDS... --out FILE`"
        ) from None
