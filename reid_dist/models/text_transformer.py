"""open_clip's text transformer with prompts, inserted embeddings and its tokens as an output.

Shape suffixes: B batch, L caption tokens, M prompts or inserted embeddings, J blocks with prompts of their own,
W width, D feature size.
"""

import torch
from open_clip.transformer import TextTransformer, text_global_pool
from torch import Tensor, nn

from reid_dist.errors import UserError
from reid_dist.models.prompts import new_prompts, run_blocks
from reid_dist.models.tower import Projects, TowerOutput


class TextTower(Projects, TextTransformer):  # type: ignore[misc]  # open_clip has no types
    """A built tower's own parts under their own names, so weights load and features are as open_clip's bit for bit.

    Prompts follow the start token: under the causal mask every word and the end token see them. The end token is found
    in the ids as they come in.

    Args:
        tower: taken over; do not use it any more.
        prompt_length: M; 0: none.
        prompt_depth: J.

    Raises:
        UserError: more depth than blocks, no room for words, or prompts in a tower without start and end token.
    """

    prompts: nn.Parameter | None

    def __init__(self, tower: TextTransformer, prompt_length: int = 0, prompt_depth: int = 1) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(tower.__dict__)
        causal = self.attn_mask is not None and self.cls_emb is None and self.pool_type in ("argmax", "eos")
        if prompt_length and not causal:
            raise UserError(
                "model.prompts.text_length: this text tower has no start and end token; set it to 0, or choose an"
                " architecture such as ViT-B-16"
            )
        if prompt_length > self.context_length - 3:
            raise UserError(
                f"model.prompts.text_length: {prompt_length} prompts leave no word of {self.context_length} tokens"
            )
        self.prompts = new_prompts(self.transformer, prompt_length, prompt_depth, "model.prompts.text_depth")
        self.prompt_length = prompt_length

    @property
    def gives_tokens(self) -> bool:
        """Whether `details` can be asked for: not of CoCa's towers, which append a token of their own."""
        return self.cls_emb is None

    @property
    def caption_length(self) -> int:
        """Tokens of the longest caption, start and end included: what the prompts leave of the context."""
        return int(self.context_length) - self.prompt_length

    def forward(
        self, token_BL: Tensor, details: bool = False, inserted_BMW: Tensor | None = None, at: int = 1
    ) -> Tensor | TowerOutput:
        """Features, or with `details` also the tokens without prompts. Shape: (B, L) -> (B, D).

        Args:
            token_BL: ids. What exceeds `caption_length` is cut off with prompts; the end token stays last.
            details: see above.
            inserted_BMW: instead of the embeddings of the tokens at..at+M-1 (CoOp, Zhou et al. 2022).
            at: position of the first of them.
        """
        token_BL = self._cut(token_BL)
        x_BLW, mask = self._embeds(token_BL)
        if inserted_BMW is not None:
            x_BLW = self._replace(x_BLW, inserted_BMW, at)
        if mask is not None and mask.dim() == 2:
            length = x_BLW.shape[1] + self.prompt_length
            mask = mask[:length, :length]
        x_BLW = run_blocks(self.transformer, x_BLW, self.prompts, at=1, mask=mask)
        if self.cls_emb is not None:
            return self._project(self.ln_final(x_BLW[:, -1]))
        x_BLW = self.ln_final(x_BLW)
        features_BD = self._project(text_global_pool(x_BLW, token_BL, self.pool_type, self.eos_id))
        return TowerOutput(features_BD, self._project(x_BLW)) if details else features_BD

    def _cut(self, token_BL: Tensor) -> Tensor:
        room = self.caption_length
        if not self.prompt_length or token_BL.shape[1] <= room:
            return token_BL
        is_end_BL = token_BL == self.eos_id if self.pool_type == "eos" else token_BL
        end_B1 = is_end_BL.int().argmax(dim=1, keepdim=True)
        last_B1 = torch.where(end_B1 >= room, token_BL.gather(1, end_B1), token_BL[:, room - 1 : room])
        return torch.cat([token_BL[:, : room - 1], last_B1], dim=1)

    def _replace(self, x_BLW: Tensor, inserted_BMW: Tensor, at: int) -> Tensor:
        end = at + inserted_BMW.shape[1]
        if at < 0 or end > x_BLW.shape[1]:
            raise ValueError(f"inserted embeddings {at}..{end - 1}: a caption has {x_BLW.shape[1]} tokens")
        placed_BMW = inserted_BMW.to(x_BLW.dtype) + self.positional_embedding[at:end].to(x_BLW.dtype)
        return torch.cat([x_BLW[:, :at], placed_BMW, x_BLW[:, end:]], dim=1)

    def _project(self, x: Tensor) -> Tensor:
        if isinstance(self.text_projection, nn.Linear):
            projected: Tensor = self.text_projection(x)
            return projected
        return x if self.text_projection is None else x @ self.text_projection
