"""Learned words for each identity inside one sentence (CLIP-ReID, Li, Sun & Li, AAAI 2023).

Shape suffixes: B identities asked for, C identities, L tokens of the sentence, M learned tokens, W width of a token.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from reid_dist.errors import UserError
from reid_dist.models.text_transformer import TextTower

Tokenize = Callable[[Sequence[str]], Tensor]  # N sentences to ids, 0 after the end. Shape: (N, L)

# What stands for a learned token until it is replaced; a single token of CLIP's vocabulary, as published.
_PLACEHOLDER = "X"


class IdentityPrompts(nn.Module):
    """A sentence with M tokens of each identity's own, from N(0, 0.02).

    The tokens are the only parameter. They go to a text tower as `tower(token_BL, inserted_BMW=..., at=self.at)`.

    Args:
        tower: the text tower that will read the sentences.
        tokenizer: of its captions; None, in a dry run: a token for each word, whichever.
        template: the sentence, in which `{}` stands for the tokens.
        count: M.
        identities: C.

    Attributes:
        at: position of the first learned token.
        identities: C; a parameter's own shape is gone under ZeRO 3.

    Raises:
        UserError: a tower that takes no learned tokens, or a sentence that does not fit into it.
    """

    token_L: Tensor

    def __init__(
        self, tower: nn.Module, tokenizer: Tokenize | None, template: str, count: int, identities: int
    ) -> None:
        super().__init__()
        if not (isinstance(tower, TextTower) and tower.attn_mask is not None and tower.pool_type in ("argmax", "eos")):
            raise UserError(
                "kind: identity_prompt: this architecture's text tower has no start and end token, between which"
                " learned tokens could stand; choose an architecture such as ViT-B-16"
            )
        token_L, self.at = _guessed(template, count) if tokenizer is None else _sentence(tokenizer, template, count)
        if len(token_L) > tower.caption_length:
            raise _too_long(template, count, tower.caption_length)
        self.identities = identities
        self.register_buffer("token_L", token_L, persistent=False)
        width = tower.get_parameter("positional_embedding").shape[1]
        self.token_CMW = nn.Parameter(torch.empty(identities, count, width).normal_(std=0.02))

    def forward(self, label_B: Tensor) -> tuple[Tensor, Tensor]:
        """The sentence's ids, once for each identity, and the tokens to insert. Shapes: (B, L), (B, M, W)."""
        return self.token_L.expand(len(label_B), -1), self.token_CMW[label_B]


def _sentence(tokenizer: Tokenize, template: str, count: int) -> tuple[Tensor, int]:
    """Ids without padding, which no token before it sees; and the position of the first placeholder. Shape: (L,)."""
    before, _, after = template.partition("{}")
    rows = tokenizer([template.replace("{}", " ".join([_PLACEHOLDER] * count)), before, after, ""])
    whole, head, tail, empty = (_length(row) for row in rows)
    if whole != head + tail - empty + count:
        raise _too_long(template, count, rows.shape[1])
    return rows[0, :whole], head - 1  # `head` ends with the end token, in whose place the first one stands


def _too_long(template: str, count: int, most: int) -> UserError:
    return UserError(
        f"loss.template: {template!r} with loss.tokens: {count} does not fit into the {most} tokens of this model;"
        " shorten it"
    )


def _guessed(template: str, count: int) -> tuple[Tensor, int]:
    words = len(template.replace("{}", " ").split())
    return torch.ones(words + count + 2, dtype=torch.int64), 1


def _length(token_L: Tensor) -> int:
    return int(token_L.nonzero().max()) + 1
