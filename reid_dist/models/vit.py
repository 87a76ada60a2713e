"""open_clip's vision transformer with prompts, a second class token and its tokens as an output.

Shape suffixes: B batch, C channels, H rows, W columns (of images) or width (of tokens), N class token and patches,
M prompts, J blocks with prompts of their own, D feature size.
"""

import torch
from open_clip.transformer import PatchDropout, VisionTransformer
from torch import Tensor, nn

from reid_dist.errors import UserError
from reid_dist.models.prompts import insert, new_prompts, run_blocks
from reid_dist.models.tower import Projects, TowerOutput


class VitTower(Projects, VisionTransformer):  # type: ignore[misc]  # open_clip has no types
    """A built tower's own parts under their own names, so weights load and features are as open_clip's bit for bit.

    The tokens are [class, (class for image queries), prompts, patches]. The second class token (HPL's task-routed
    transformer, Zhou et al. 2026, section 4.2 of methods.md) begins as a copy of the first, at the same position.

    Args:
        tower: taken over; do not use it any more.
        prompt_length: M; 0: none.
        prompt_depth: J.
        dual_token: whether there is a second class token.

    Raises:
        UserError: more depth than blocks, or a second class token beside a first that is not the feature.
    """

    class_embedding_i2i: nn.Parameter | None
    prompts: nn.Parameter | None

    def __init__(
        self, tower: VisionTransformer, prompt_length: int = 0, prompt_depth: int = 1, dual_token: bool = False
    ) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(tower.__dict__)
        if dual_token and (self.attn_pool is not None or self.pool_type != "tok"):
            raise UserError(
                "model.dual_token: this image tower's feature is no class token; choose another, such as ViT-B-16"
            )
        first = self.class_embedding
        self.class_embedding_i2i = nn.Parameter(first.detach().clone()) if dual_token else None
        self.prompts = new_prompts(self.transformer, prompt_length, prompt_depth, "model.prompts.visual_depth")

    @property
    def gives_tokens(self) -> bool:
        """Whether `details` can be asked for: not of a tower that pools by attention."""
        return self.attn_pool is None

    def set_patch_dropout(self, share: float) -> None:
        """Leaves out a random share of the patches in training, other ones for each image (Li et al. 2023, FLIP)."""
        if not 0 <= share < 1:
            raise ValueError(f"patch dropout {share} is not in 0..1")
        self.patch_dropout = PatchDropout(share) if share else nn.Identity()

    def forward(self, image_BCHW: Tensor, details: bool = False) -> Tensor | TowerOutput:
        """Features, or with `details` also the tokens without prompts. Shape: (B, 3, H, W) -> (B, D)."""
        x_BNW = self._embeds(image_BCHW)
        classes = 1
        if self.class_embedding_i2i is not None:
            classes = 2
            second_W = self.class_embedding_i2i.to(x_BNW.dtype) + self.positional_embedding[0].to(x_BNW.dtype)
            x_BNW = insert(x_BNW, self.ln_pre(second_W[None]), at=1)
        x_BNW = run_blocks(self.transformer, x_BNW, self.prompts, at=classes)
        second_BW = x_BNW[:, 1] if classes == 2 else None
        if second_BW is not None:
            x_BNW = torch.cat([x_BNW[:, :1], x_BNW[:, 2:]], dim=1)
        pooled_BW, _ = self._pool(x_BNW)
        features_BD = self._project(pooled_BW)
        if not details:
            return features_BD
        i2i_BD = None if second_BW is None else self._project(self.ln_post(second_BW))
        return TowerOutput(features_BD, self._project(self.ln_post(x_BNW)), i2i_BD)

    def _project(self, x: Tensor) -> Tensor:
        return x if self.proj is None else x @ self.proj
