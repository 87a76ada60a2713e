"""What a training stage is: model + losses as one module, so that an engine and the trainer see only `stage(batch)`."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reid_dist.errors import UserError
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.models.momentum import TOWERS
from reid_dist.models.projection import projection_names
from reid_dist.models.sharded_classifier import ShardedClassifier
from reid_dist.optim import TrainableGroup
from reid_dist.pieces import Piece, Saved
from reid_dist.stages.contract import Batch, Features, StageOutput, State, Weights
from reid_dist.stages.momentum_contrast import MomentumContrast


class Stage(nn.Module):
    """Base of the stages; `encoder` is the only part that outlives a stage.

    A forward is `keys`, `features`, `loss`, in this order and without side effects; `after_step` has them, once for an
    optimizer step. The loss sees the encoder only through the features, so that these can be cached
    (`cached_gradients.py`).

    Args:
        encoder: the dual encoder, changed by training.
        freeze: names of towers (`visual`, `text`) that do not train and stay in evaluation mode, or of their trunks
            (`visual_trunk`, `text_trunk`): all but the last linear map, which trains.
        train_prompts: the towers' prompts train, those of frozen towers too; False: none do.

    Attributes:
        frozen: towers that do not train at all.
        moco: queue and key encoders of the stages that have them.
        sharded: class centres that the ranks hold together, of the stages that have them.

    Raises:
        UserError: a trunk is to be frozen of a tower that has no last linear map.
    """

    def __init__(self, encoder: DualEncoder, freeze: Iterable[str] = (), train_prompts: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        freeze = tuple(freeze)
        self.frozen = tuple(name for name in freeze if name in TOWERS)
        self._still = {name.removesuffix("_trunk") for name in freeze}
        self.moco: MomentumContrast | None = None
        self.sharded: ShardedClassifier | None = None
        for name in freeze:
            _freeze(encoder, name)
        for prompts in encoder.prompts().values():
            prompts.requires_grad_(train_prompts)

    def prepare(self, micro_batches: list[Batch]) -> list[Batch]:
        """Adds what the micro-batches of one step must know of each other."""
        if self.sharded is not None:
            self.sharded.begin(torch.cat([batch["pid_B"] for batch in micro_batches]))
        return micro_batches if self.moco is None else self.moco.with_step_ids(micro_batches)

    def keys(self, batch: Batch) -> State:
        """What a micro-batch leaves for `after_step`, made before the anchors so that its transfer runs beside them."""
        return {} if self.moco is None else self.moco.keys(batch)

    def features(self, batch: Batch, state: State) -> Features:
        """What the loss needs of the encoder.

        Args:
            batch: image_BCHW uint8, token_BL, pid_B, camid_B, sample_id_B; masked_token_BL and masked_label_BL where
                words are hidden. In a mix with uncaptioned sets captioned_B, and text of the captioned rows alone.
            state: what `keys` gave for it.
        """
        raise NotImplementedError

    def loss(self, features: Features, batch: Batch, states: Sequence[State]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the rows and parts of it to log; differentiable in the features and the stage's own heads.

        Args:
            features: of one micro-batch, or of several in order.
            batch: what is known of the same rows; no images or tokens.
            states: of the same micro-batches.
        """
        raise NotImplementedError

    def forward(self, batch: Batch, part: Callable[[Batch], Any] | None = None) -> Any:
        """The `StageOutput` of a micro-batch, or `part(batch)`: to an engine every pass must be a forward."""
        if part is not None:
            return part(batch)
        state = self.keys(batch)
        loss, metrics = self.loss(self.features(batch, state), batch, [state])
        return StageOutput(loss=loss, metrics=metrics, state=state)

    def start(self, weights: Weights) -> None:
        """Called once, when the engine has made all ranks' weights equal."""
        if self.moco is not None:
            self.moco.start(weights)

    def set_learning_rate(self, factor: float) -> None:
        """Called before each step: the factor of the learning rates, for what the engine does not train."""
        if self.sharded is not None:
            self.sharded.factor = factor

    def leaves(self) -> list[Tensor]:
        """What the loss that was just computed can be differentiated in beside features and parameters."""
        return [] if self.sharded is None or self.sharded.leaf is None else [self.sharded.leaf]

    def after_step(self, states: Sequence[State], updated: bool, weights: Weights) -> None:
        """Side effects of an optimizer step.

        Args:
            states: of all its micro-batches, in order.
            updated: False when the engine skipped the step: then nothing may change, on any rank.
            weights: the engine's, after the step.
        """
        if self.sharded is not None:
            self.sharded.end(updated)
        if self.moco is not None and updated:
            self.moco.after_step(states, weights)

    def counters(self) -> dict[str, int]:
        """Counts of steps beside the engine's, the same on all ranks, for a checkpoint."""
        found = {} if self.moco is None else {"commits": self.moco.commits}
        return found if self.sharded is None else {**found, "classifier": self.sharded.steps}

    def pieces(self) -> Iterator[Piece]:
        """This rank's share of what the engine does not hold: queue, key encoders, class centres. PERSONAL DATA."""
        if self.moco is not None:
            yield from self.moco.pieces()
        if self.sharded is not None:
            yield from self.sharded.pieces()

    def restore(self, saved: Saved, counters: Mapping[str, int]) -> None:
        """Takes up what `pieces` and `counters` gave; after `start`, and after weights and buffers are restored."""
        if self.moco is not None:
            self.moco.restore(saved, dict(self.named_buffers()), counters["commits"])
        if self.sharded is not None:
            self.sharded.restore(saved, counters["classifier"])

    def bytes_beside(self, world_size: int) -> float:
        """Bytes of one rank of `world_size` that the engine does not hold."""
        centres = 0.0 if self.sharded is None else self.sharded.bytes_on(world_size)
        return centres + (0.0 if self.moco is None else self.moco.bytes_beside(world_size))

    def handover(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the next stage needs beside the encoder, by name; the same on all ranks. Collective. Nothing here.

        Args:
            weights: all parameters and buffers, in full.
        """
        return {}

    def trainable(self) -> list[TrainableGroup]:
        """The parameters that train: those that pretrained weights exist for, and new ones of encoder and heads."""
        named = {name: p for name, p in self.named_parameters() if p.requires_grad}
        added = {f"encoder.{name}" for name in self.encoder.new_parameters()}
        old = {name: p for name, p in named.items() if name.startswith("encoder.") and name not in added}
        new = {name: p for name, p in named.items() if name not in old}
        return [TrainableGroup(False, old), TrainableGroup(True, new)]

    def train(self, mode: bool = True) -> "Stage":
        """Training mode for all but frozen towers and trunks, whose normalisation and dropout must not move."""
        super().train(mode)
        for tower in self._still:
            getattr(self.encoder, tower).eval()
        return self


def _freeze(encoder: DualEncoder, name: str) -> None:
    """Keeps a tower from training, or with `_trunk` behind its name all of it but the last linear map."""
    tower = getattr(encoder, name.removesuffix("_trunk"))
    trained = projection_names(tower) if name not in TOWERS else set()
    if name not in TOWERS and not trained:
        raise UserError(f"freeze: {name}: this tower has no last linear map that could train; give it model.projection")
    for weight, parameter in tower.named_parameters():
        if weight not in trained:
            parameter.requires_grad_(False)
