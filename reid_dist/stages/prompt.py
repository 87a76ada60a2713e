"""Prompt stage: the towers' prompts learn the new domain, all else stays as it was (methods.md card 2, stage 1)."""

from reid_dist.config import TextLoss
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.stages.contract import ALONE, Surroundings
from reid_dist.stages.t2i import T2IStage


class PromptStage(T2IStage):
    """The losses of the text-to-image stage with both towers frozen, the temperature too; only prompts train."""

    def __init__(self, encoder: DualEncoder, loss: TextLoss, run: Surroundings = ALONE) -> None:
        super().__init__(encoder, loss, ("visual", "text"), run, train_prompts=True)
        encoder.logit_scale.requires_grad_(False)
