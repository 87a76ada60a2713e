"""CM-MoCo: anchors of one modality against a queue of the other's momentum keys (Han et al. 2021; methods.md 3.4).

Shape suffixes: B rows of this rank, S of its whole step, U of the step on all ranks, D features.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from reid_dist.config import ContrastiveLoss, TextLoss
from reid_dist.distributed import all_gather, check_equal_on_ranks
from reid_dist.kernels.contrastive import Mask, moco_from_lse, supcon_from_lse
from reid_dist.kernels.reference import row_products
from reid_dist.losses.contrastive import normalize
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.models.momentum import TOWERS, MomentumEncoder
from reid_dist.models.queue import FeatureQueue
from reid_dist.models.queue_ring import Modality
from reid_dist.pieces import Piece, Saved
from reid_dist.stages.contract import Batch, State, Surroundings, Weights


class MomentumContrast:
    """Queue, key encoders and the loss against them; not a module, so that engine and export do not see it.

    Negatives are the queue's keys without those of the anchor's identity or, as published, of any identity in the step
    (`queue_mask: batch`); with `in_batch_negatives` also the current keys of all ranks, which with accumulation are
    those of the anchor's micro-batch unless gradients are cached. All else depends on the whole step alone, so N ranks
    with A micro-steps equal N x A ranks.

    `positives` "pair": the own key only, and L = L_v + L_t, the published sum. "identity": all keys of the identity,
    the own one and those in the queue (SupCon, Khosla et al. 2020, eq. 2, "out"), and L = (L_v + L_t) / 2, which has
    the scale of the loss without a queue.

    Published, the key encoders move before the key forward; here after the optimizer step, which is the same sequence,
    because the first published move meets equal weights. A skipped step moves neither them nor the queue.

    Args:
        encoder: the one that trains.
        frozen: its towers that do not train: their own features are the keys.
        setting: of the loss.
        place: the run; the queue is in bfloat16 unless the precision is fp32.
        positives: see above.
        ids: the batch's entry that says which keys are of one identity.

    Attributes:
        commits: steps whose keys have entered.
    """

    def __init__(
        self,
        encoder: DualEncoder,
        frozen: Sequence[str],
        setting: ContrastiveLoss,
        place: Surroundings,
        positives: Literal["identity", "pair"],
        ids: str,
    ) -> None:
        self.encoder, self.frozen, self.setting, self.positives, self.ids = encoder, frozen, setting, positives, ids
        self.queue = FeatureQueue(
            setting.queue_size,
            encoder.features,
            place.rows,
            init=setting.queue_init,
            sharded=setting.queue_sharded,
            dtype=torch.float32 if place.precision == "fp32" else torch.bfloat16,
            device=place.device,
            seed=place.seed,
        )
        # Under autocast the copy stays fp32, as the encoder does.
        cast = torch.bfloat16 if place.precision == "pure_bf16" else torch.float32
        towers = [tower for tower in TOWERS if tower not in frozen]
        redrawn = isinstance(setting, TextLoss) and setting.key_start == "redrawn"
        self.key_encoder = MomentumEncoder(
            encoder, towers, setting.momentum, setting.key_head, cast, place.seed if redrawn else None
        )
        self.commits = 0

    def bytes_beside(self, world_size: int) -> float:
        """Of queue and key encoders, on one rank of `world_size`."""
        shards = world_size if self.setting.queue_sharded else 1
        return self.queue.nbytes / shards + self.key_encoder.nbytes

    def with_step_ids(self, micro_batches: list[Batch]) -> list[Batch]:
        """Tells each micro-batch the identities of the whole step, where the mask wants them."""
        if self.setting.queue_mask == "identity":
            return micro_batches
        step_id_S = torch.cat([batch[self.ids] for batch in micro_batches])
        return [{**batch, "step_id_S": step_id_S} for batch in micro_batches]

    @torch.no_grad()
    def keys(self, batch: Batch) -> State:
        """Keys of a micro-batch: this rank's own, and all ranks' on their way; and what frozen towers gave, as is."""
        visual, text = (self.encoder if tower in self.frozen else self.key_encoder for tower in TOWERS)
        image_BD, text_BD = visual.encode_image(batch["image_BCHW"]), text.encode_text(batch["token_BL"])
        known = {"image_features": image_BD} if "visual" in self.frozen else {}
        known |= {"text_features": text_BD} if "text" in self.frozen else {}
        image_BD, text_BD = normalize(image_BD), normalize(text_BD)
        pending = self.queue.gather(image_BD, text_BD, batch[self.ids])
        return {"image_BD": image_BD, "text_BD": text_BD, "pending": pending, "known": known}

    def loss(
        self, image_BD: Tensor, text_BD: Tensor, log_scale: Tensor, batch: Batch, states: Sequence[State]
    ) -> Tensor:
        """Of this rank's rows, features as the encoder gave them; the mean over ranks is the global batch's."""
        step_id_U = None
        if self.setting.queue_mask == "batch":
            step_id_U = all_gather(batch.get("step_id_S", batch[self.ids]))
        with torch.autocast(image_BD.device.type, enabled=False):
            loss_v = self._direction(normalize(image_BD), "text", log_scale, batch[self.ids], step_id_U, states).mean()
            loss_t = self._direction(normalize(text_BD), "image", log_scale, batch[self.ids], step_id_U, states).mean()
        return loss_v + loss_t if self.positives == "pair" else (loss_v + loss_t) / 2

    def _direction(
        self,
        anchors_BD: Tensor,
        modality: Modality,
        log_scale: Tensor,
        ids_B: Tensor,
        step_id_U: Tensor | None,
        states: Sequence[State],
    ) -> Tensor:
        """Anchors against the keys of a modality. Shape: (B,)."""
        own_BD = torch.cat([state[f"{modality}_BD"] for state in states])
        current = [state["pending"] for state in states] if self.setting.in_batch_negatives else []
        call = (anchors_BD, modality, ids_B, log_scale)
        mask: Mask = "identity" if step_id_U is None else "none"
        negative_B = self.queue.lse(*call, mask=mask, batch_ids_U=step_id_U, current=current)
        if self.positives == "pair":
            return moco_from_lse(anchors_BD, own_BD, negative_B, log_scale)
        positive_B = self.queue.lse(*call, mask="positives", current=current)
        mean_BD, count_B = self.queue.positive_means(modality, ids_B, current)
        if not current:  # they would hold the own key too
            positive_B = torch.logaddexp(positive_B.double(), row_products(anchors_BD, own_BD, log_scale))
            mean_BD = mean_BD + (own_BD - mean_BD) / (count_B + 1)[:, None]
        return supcon_from_lse(negative_B, positive_B, mean_BD, anchors_BD, log_scale)

    def start(self, weights: Weights) -> None:
        """Takes over the weights that all ranks begin with."""
        self.key_encoder.start(weights(self.key_encoder.names))

    def pieces(self) -> Iterator[Piece]:
        """This rank's share of queue and key encoders, for a checkpoint. PERSONAL DATA."""
        yield from self.queue.pieces()
        yield from self.key_encoder.pieces()

    def restore(self, saved: Saved, buffers: Mapping[str, Tensor], commits: int) -> None:
        """Takes up what `pieces` gave; see `MomentumEncoder.restore`."""
        self.queue.restore(saved)
        self.key_encoder.restore(saved, buffers)
        self.commits = commits

    def after_step(self, states: Sequence[State], weights: Weights) -> None:
        """Enqueues the step's keys and moves the key encoders. Now and then the ranks compare theirs.

        Raises:
            DivergenceError: they differ.
        """
        self.queue.commit([state["pending"] for state in states])
        self.key_encoder.update(weights(self.key_encoder.names))
        self.commits += 1
        every = self.setting.queue_check_every
        if every and self.commits % every == 0:
            self.queue.check_agreement()
            check_equal_on_ranks(self.key_encoder.digest(), "the momentum encoder")
