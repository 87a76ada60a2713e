"""Key encoders of momentum contrast: slow copies of the towers that train.

He et al. 2020 (MoCo), equation 2, as CM-MoCo uses it (methods.md 3.4). The published order, momentum update before the
key forward, is the same as an update after each optimizer step: the first published update meets equal weights.

Shape suffixes: B batch, C channels, H rows, W columns, L tokens, D feature size.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from reid_dist.digest import digest
from reid_dist.errors import UserError
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.models.linear import redraw, redrawn_linears
from reid_dist.models.projection import projection_names
from reid_dist.pieces import Piece, Saved, read_whole, shared_out

Tower = Literal["visual", "text"]
TOWERS: tuple[Tower, ...] = ("visual", "text")
PART = "key_encoder"  # of a run's state
_PREFIX = "encoder."


class MomentumEncoder:
    """Exponential moving averages of an encoder's weights, and a forward with them.

    Not an `nn.Module`: an engine that casts, shards or saves the stage must not see it. BatchNorm normalises keys with
    their own batch's statistics (as published); running statistics are the encoder's, copied at `update`, and no key
    forward moves them. So between two updates nothing here changes, however many keys are made.

    Args:
        encoder: copied as it is now, in fp32; `start` aligns the copy once the engine has broadcast the weights.
        towers: those that train. A frozen tower has no copy: its own features are the keys.
        momentum: share m of the old average that an update keeps.
        head: of a tower's projection to D: averaged too, or the encoder's own as it is (`live`, as published).
        dtype: of the weights in the forward: a cast of the averages unless fp32. Under autocast leave it at fp32: the
            surrounding autocast then treats the copy as it treats the encoder.
        redraw_seed: averages of the linear maps of `redrawn_linears` begin as drawn from it, as in TextReID's code,
            where keys and anchors begin in two networks. None: all begin as copies.

    Attributes:
        names: what `start` and `update` want, parameters and buffers, as the stage names them ("encoder.visual...").

    Raises:
        UserError: a live head of a tower that has no projection, or nothing to draw anew.
    """

    def __init__(
        self,
        encoder: DualEncoder,
        towers: Sequence[Tower],
        momentum: float = 0.999,
        head: Literal["momentum", "live"] = "momentum",
        dtype: torch.dtype = torch.float32,
        redraw_seed: int | None = None,
    ) -> None:
        if not 0 <= momentum <= 1 or not towers:
            raise ValueError(f"momentum {momentum} of towers {towers}: wants a number in 0..1 and at least one tower")
        self.momentum = momentum
        self.towers = tuple(towers)
        self._encoder = _key_copy(encoder, self.towers)
        self._cast = dtype != torch.float32
        self._forward = self._tensors()
        self._masters = self._forward
        self.names = list(self._masters)
        parameters = {_PREFIX + name for name, _ in self._encoder.named_parameters()}
        self._parameters = [name for name in self.names if name in parameters]
        self._averaged = set(self._parameters) - (self._projections() if head == "live" else set())
        self._redrawn = {} if redraw_seed is None else self._draw(redraw_seed)
        if self._cast:
            self._masters = {name: tensor.clone() for name, tensor in self._forward.items()}
            # Not `.to(dtype)`: that would round the image statistics too, which engines leave in fp32.
            for parameter in self._encoder.parameters():
                parameter.data = parameter.data.to(dtype)
            self._forward = self._tensors()

    @torch.no_grad()
    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        """Keys of images, not normalised; as `DualEncoder.encode_image`. Shape: (B, 3, H, W) -> (B, D)."""
        self._require("visual")
        return self._encoder.encode_image(image_BCHW)

    @torch.no_grad()
    def encode_text(self, token_BL: Tensor) -> Tensor:
        """Keys of captions, not normalised; as `DualEncoder.encode_text`. Shape: (B, L) -> (B, D)."""
        self._require("text")
        return self._encoder.encode_text(token_BL)

    def start(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes the weights as they are, and moves to their device.

        Args:
            weights: full fp32 tensors of all `names`, as `Engine.exact_parameters` yields them.

        Raises:
            ValueError: a name that is missing, foreign or named twice.
            TypeError: parameters of another precision.
        """
        for name, weight in self._checked(weights):
            self.to(weight.device)
            self._masters[name].copy_(self._redrawn.get(name, weight))
            if name in self._redrawn and name in self._averaged:
                # The first published move comes before the first keys; elsewhere it meets equal weights.
                self._masters[name].lerp_(weight, 1 - self.momentum)
            self._refresh(name)

    def update(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Averages (k <- m k + (1 - m) weight) once an optimizer step was applied; copies buffers and a live head.

        Args:
            weights: as for `start`, which also says what is refused.
        """
        for name, weight in self._checked(weights):
            if name in self._averaged:
                # Rounds the small step, not the weight: mul_().add_() drifts ten times as far in a thousand steps.
                self._masters[name].lerp_(weight, 1 - self.momentum)
            else:
                self._masters[name].copy_(weight)
            self._refresh(name)

    def to(self, device: torch.device) -> None:
        """Moves averages and forward copy to a device."""
        if self._masters[self.names[0]].device == device:
            return
        self._encoder.to(device)
        self._forward = self._tensors()
        self._masters = {n: t.to(device) for n, t in self._masters.items()} if self._cast else self._forward

    def state(self) -> dict[str, Tensor]:
        """The averages and the copied buffers by name; the tensors themselves, which the next update changes."""
        return dict(self._masters)

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes what `state` gave, here or in another run; stays on its device. Refuses what `start` refuses."""
        for name, tensor in self._checked(state.items()):
            self._masters[name].copy_(tensor)
            self._refresh(name)

    def pieces(self) -> Iterator[Piece]:
        """This rank's share of the averages, for a checkpoint."""
        for name in self._parameters:
            yield from shared_out(PART, name, self._masters[name])

    def restore(self, saved: Saved, buffers: Mapping[str, Tensor]) -> None:
        """Takes up what `pieces` gave; the copied buffers from the encoder, as `update` does.

        Args:
            saved: of any number of ranks.
            buffers: the encoder's, restored.
        """
        for name, master in self._masters.items():
            shape = tuple(master.shape)
            master.copy_(read_whole(saved, PART, name, shape) if name in self._parameters else buffers[name])
            self._refresh(name)

    def digest(self) -> Tensor:
        """Hash of the key weights, to compare ranks: int64, shape ().

        Buffers are left out: BatchNorm's may differ between ranks, and no key depends on them.
        """
        weights = [self._masters[name] for name in self._parameters]
        return digest(weights, weights[0].device)

    @property
    def nbytes(self) -> int:
        """Bytes of the averages and, where that is a cast, of the forward copy."""
        tensors = [*self._masters.values(), *(self._forward.values() if self._cast else ())]
        return sum(tensor.nbytes for tensor in tensors)

    def _tensors(self) -> dict[str, Tensor]:
        """The forward copy's own parameters and stored buffers, those of the towers."""
        stored = self._encoder.state_dict()
        named = (*self._encoder.named_parameters(), *self._encoder.named_buffers())
        of_towers = (pair for pair in named if pair[0] in stored and pair[0].partition(".")[0] in self.towers)
        return {_PREFIX + name: tensor.detach() for name, tensor in of_towers}

    def _require(self, tower: Tower) -> None:
        if tower not in self.towers:
            raise ValueError(
                f"momentum encoder: the {tower} tower is frozen and has no copy; its features are the keys"
            )

    def _refresh(self, name: str) -> None:
        if self._cast:
            self._forward[name].copy_(self._masters[name])

    def _checked(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        missing = set(self.names)
        for name, weight in weights:
            if name not in missing:
                raise ValueError(f"momentum encoder: {name} is not among its names, or came twice")
            master = self._masters[name]
            if weight.shape != master.shape:
                raise ValueError(f"momentum encoder: {name} has shape {weight.shape}, not {master.shape}")
            if name in self._averaged and weight.dtype != master.dtype:
                raise TypeError(f"momentum encoder: {name} is {weight.dtype}; an average wants {master.dtype}")
            missing.remove(name)
            yield name, weight
        if missing:
            raise ValueError(f"momentum encoder: no weights for {', '.join(sorted(missing))}")

    def _draw(self, seed: int) -> dict[str, Tensor]:
        """Other weights for some linear maps, the same on all ranks."""
        generator = torch.Generator().manual_seed(seed)
        found: dict[str, Tensor] = {}
        for tower in self.towers:
            for name, linear in redrawn_linears(getattr(self._encoder, tower)).items():
                redraw(linear, generator)
                named = {f"{_PREFIX}{tower}.{name}.{part}": p for part, p in linear.named_parameters()}
                found |= {name: p.detach().clone() for name, p in named.items() if name in self._averaged}
        if not found:
            raise UserError(
                "loss.key_start: redrawn is of a CLIP ResNet's attention pool and of the map behind a dictionary; this"
                " architecture trains neither; use copy"
            )
        return found

    def _projections(self) -> set[str]:
        names = set()
        for tower in self.towers:
            found = projection_names(getattr(self._encoder, tower))
            if not found:
                raise UserError(
                    f"loss.key_head: live takes the projection, and this architecture's {tower} tower has none; use"
                    " momentum"
                )
            names |= {f"{_PREFIX}{tower}.{name}" for name in found}
        return names


def _key_copy(encoder: DualEncoder, towers: Sequence[Tower]) -> DualEncoder:
    """A copy in training mode that needs no gradient and keeps its running statistics; frozen towers are left out."""
    # Cloned beforehand, for a tensor's own deepcopy looks at its memory, which the dry run's fake ones do not have.
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().clone(), False) for p in encoder.parameters()}
    memo |= {id(buffer): buffer.clone() for buffer in encoder.buffers()}
    memo |= {id(getattr(encoder, tower)): None for tower in TOWERS if tower not in towers}
    key_encoder = copy.deepcopy(encoder, memo)
    for tower in towers:
        # There is no backward to recompute for, yet it would read the random state: a sync for every block.
        getattr(key_encoder, tower).set_grad_checkpointing(False)
    for module in key_encoder.modules():
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False
    return key_encoder.train()
