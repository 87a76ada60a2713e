"""The cross-modal encoder of IRRA: hidden words of a caption are told from the other words and the image.

Shape suffixes: B rows of this rank, L text tokens, N image tokens, D features, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn

from reid_dist.errors import UserError

HEAD_FEATURES = 64


class CrossModalEncoder(nn.Module):
    """Text tokens attend to image tokens, then to each other (Jiang & Ye, CVPR 2023, section 3.2; methods.md A4).

    z = T(MHA(LN_t(text), LN_i(image), LN_i(image))) with T `depth` pre-norm blocks of CLIP's form and a last norm, and
    logits = W LN(QuickGELU(W' z)). Image tokens come under one norm for keys and values. The attention to the image
    has no residual: all that is known of a word's neighbours goes into the question to the image. Nothing is masked
    out, padding is attended to as in the published code.

    Args:
        features: D; heads of 64 features each (one head where D is less).
        depth: blocks, at least 1.
        vocab_size: V.

    Raises:
        UserError: D is not made of whole heads.
    """

    def __init__(self, features: int, depth: int, vocab_size: int) -> None:
        super().__init__()
        heads = max(1, features // HEAD_FEATURES)
        if features % heads:
            raise UserError(
                f"loss.mlm_weight: the cross-modal encoder has attention heads of {HEAD_FEATURES} features, into which"
                f" the model's {features} (embed_dim) do not divide; set it to 0 or choose another architecture"
            )
        self.norm_text, self.norm_image = nn.LayerNorm(features), nn.LayerNorm(features)
        self.cross_attention = nn.MultiheadAttention(features, heads, batch_first=True)
        blocks = [ResidualAttentionBlock(features, heads, act_layer=QuickGELU) for _ in range(depth)]
        self.cross_blocks = nn.ModuleList(blocks)
        self.norm_out = nn.LayerNorm(features)
        dense, words = nn.Linear(features, features), nn.Linear(features, vocab_size)
        self.mlm_head = nn.Sequential(dense, QuickGELU(), nn.LayerNorm(features), words)
        _draw_weights(self.cross_attention, blocks)
        nn.init.normal_(dense.weight, std=(2 * features) ** -0.5)
        nn.init.normal_(words.weight, std=(2 * depth * features) ** -0.5)

    def forward(self, text_tokens_BLD: Tensor, image_tokens_BND: Tensor) -> Tensor:
        """Logits of the word at each place.

        Args:
            text_tokens_BLD: all tokens of the caption with hidden words, projected, padding included.
            image_tokens_BND: all tokens of the image, projected, class token included.

        Returns:
            Shape: (B, L, V).
        """
        image_BND = self.norm_image(image_tokens_BND)
        x_BLD, _ = self.cross_attention(self.norm_text(text_tokens_BLD), image_BND, image_BND, need_weights=False)
        for block in self.cross_blocks:
            x_BLD = block(x_BLD)
        logits_BLV: Tensor = self.mlm_head(self.norm_out(x_BLD))
        return logits_BLV


def _draw_weights(cross_attention: nn.MultiheadAttention, blocks: Sequence[Any]) -> None:
    """The published standard deviations, of all but the head; norms and biases stay torch's."""
    features = cross_attention.embed_dim
    output = (2 * len(blocks) * features) ** -0.5
    for attention in (cross_attention, *(block.attn for block in blocks)):
        nn.init.normal_(attention.in_proj_weight, std=features**-0.5)
        nn.init.normal_(attention.out_proj.weight, std=output)
    for block in blocks:
        nn.init.normal_(block.mlp.c_fc.weight, std=(2 * features) ** -0.5)
        nn.init.normal_(block.mlp.c_proj.weight, std=output)
