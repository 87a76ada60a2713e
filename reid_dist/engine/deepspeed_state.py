"""What DeepSpeed keeps of a stage on this rank: where which range of which parameter lies, to save, load and let go.

ZeRO 0 leaves parameters whole on every rank. ZeRO 1 and 2 lay the parameters of a group end to end and cut the whole,
so that a rank's part begins and ends within a parameter. ZeRO 3 cuts every parameter by itself. The optimizer knows its
state by the buffer that it moves: a parameter, or such a part.
"""

import itertools
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reid_dist.distributed import rank
from reid_dist.errors import UserError
from reid_dist.pieces import Piece, Saved, read_whole, shared_out
from reid_dist.stages import Stage

_STEP = "step"


@dataclass(frozen=True)
class Range:
    """A flat range of a parameter whose fp32 truth this rank holds.

    Attributes:
        name: of the parameter in the stage.
        shape: of the whole parameter.
        first: the parameter's element that the range begins with.
        count: elements.
        flat: what the optimizer moves: the parameter itself where it is whole on all ranks, else a buffer.
        start: of the range in `flat`.
        whole: whether `flat` is the parameter.
    """

    name: str
    shape: tuple[int, ...]
    first: int
    count: int
    flat: Tensor
    start: int = 0
    whole: bool = False

    def pieces(self, part: str, like_flat: Tensor) -> Iterator[Piece]:
        """This rank's piece of a tensor that lies as `flat` does."""
        if self.whole:
            yield from shared_out(part, self.name, like_flat)
        else:
            rows_N = like_flat.detach()[self.start : self.start + self.count]
            yield Piece(part, self.name, rows_N, math.prod(self.shape), self.first, shape=self.shape)

    def step_piece(self, step: Tensor) -> Iterator[Piece]:
        """The optimizer's count of steps, from the rank that holds the parameter's first element."""
        if self.whole:
            yield from shared_out(_STEP, self.name, step)
        elif self.first == 0:
            yield Piece(_STEP, self.name, step.reshape(1), 1)

    def load(self, saved: Saved, part: str, like_flat: Tensor) -> None:
        """Reads this range of a part into a tensor that lies as `flat` does."""
        rows_N = saved.rows(part, self.name, self.first, self.count)
        if self.whole:  # which need not be contiguous
            like_flat.detach().copy_(rows_N.reshape(self.shape))
        else:
            like_flat.detach()[self.start : self.start + self.count].copy_(rows_N)


class DeepSpeedState:
    """The state of one engine's stage and optimizer.

    Args:
        stage: after DeepSpeed has taken it over.
        optimizer: DeepSpeed's, which is torch's own at ZeRO 0.
        zero_stage: ZeRO stage.
        moments: names of the optimizer's state tensors, `step` among them where it counts; see `state_names`.
        exact: fp32 copies, on the CPU, of frozen weights that DeepSpeed rounds.
    """

    def __init__(
        self, stage: Stage, optimizer: Any, zero_stage: int, moments: Collection[str], exact: dict[str, Tensor]
    ) -> None:
        self._stage = stage
        self._optimizer = optimizer
        self._zero_stage = zero_stage
        self._moments = moments
        self._exact = exact

    def pieces(self) -> Iterator[Piece]:
        """See `Engine.pieces`."""
        for held in self._ranges():
            yield from held.pieces("weights", held.flat)
            state = self._optimizer.state.get(held.flat, {})
            for name in self._moments:
                if name == _STEP and name in state:
                    yield from held.step_piece(state[name])
                elif state.get(name) is not None:
                    yield from held.pieces(name, state[name])
        for name, parameter in self._frozen():
            yield from self._frozen_pieces(name, parameter)

    @torch.no_grad()
    def restore(self, saved: Saved) -> None:
        """See `Engine.restore`."""
        self._check_names(saved)
        if self._zero_stage == 3:
            self._optimizer._partition_all_parameters()
        for name, parameter in self._frozen():
            self._restore_frozen(saved, name, parameter)
        known = {name: set(saved.names(name)) for name in self._moments}
        together: dict[Tensor, list[Range]] = {}
        for held in self._ranges():
            held.load(saved, "weights", held.flat)
            together.setdefault(held.flat, []).append(held)
        for ranges in together.values():
            self._restore_moments(saved, known, ranges)
        self._derive()

    def gradients(self) -> list[Tensor]:
        """What the next step would use, between the last backward and it; above ZeRO 0 this rank's share alone."""
        if self._zero_stage == 0:
            return [p.grad for p in self._stage.parameters() if p.grad is not None]
        if hasattr(self._optimizer, "fp32_groups_gradient_flat_partition"):  # its class for pure_bf16
            return list(self._optimizer.fp32_groups_gradient_flat_partition)
        groups = self._optimizer.averaged_gradients.values()
        return [gradient for group in groups if group is not None for gradient in group]

    @torch.no_grad()
    def let_go(self) -> None:
        """Forgets the gradients of a step that shall not be, in all of DeepSpeed's buffers."""
        optimizer = self._optimizer
        if self._zero_stage == 3:
            optimizer._pre_step()
            optimizer._partition_all_parameters()
            self._gather_persistent()
        optimizer.zero_grad(set_to_none=True)
        for kept in ("averaged_gradients", "all_grad_tensors"):
            # In place: DeepSpeed's parameters refer to these dictionaries.
            found = getattr(optimizer, kept, {})
            found.update(dict.fromkeys(found))
        self.clear_shards()

    @torch.no_grad()
    def clear_shards(self) -> None:
        """Zeroes what ZeRO 3 keeps of gradients after a step.

        It would move a parameter that has no gradient in the next step by its gradient of this one, and add to it what
        comes only in a later micro-batch.
        """
        if self._zero_stage == 3:
            self._optimizer.grad_partitions_flat_buffer.zero_()

    def _ranges(self) -> Iterator[Range]:
        for name, parameter in self._stage.named_parameters():
            if not parameter.requires_grad:
                continue
            if hasattr(parameter, "ds_tensor"):
                yield from self._range_of_zero_3(name, parameter)
            elif hasattr(parameter, "_hp_mapping"):
                yield from self._range_of_zero_1(name, parameter)
            else:
                yield Range(name, tuple(parameter.shape), 0, parameter.numel(), parameter, whole=True)

    def _range_of_zero_1(self, name: str, parameter: nn.Parameter) -> Iterator[Range]:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:
            group = self._optimizer.param_groups[mapping.param_group_index]
            own, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield Range(name, tuple(parameter.shape), own.start, own.numel, group["params"][0], flat.start)

    def _range_of_zero_3(self, name: str, parameter: nn.Parameter) -> Iterator[Range]:
        first, count = _shard(parameter)
        group, start, _ = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        flat = self._optimizer.fp32_partitioned_groups_flat[group]
        if count > 0:
            yield Range(name, _shape(parameter), first, count, flat, start)

    def _frozen(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from ((name, p) for name, p in self._stage.named_parameters() if not p.requires_grad)

    def _frozen_pieces(self, name: str, parameter: nn.Parameter) -> Iterator[Piece]:
        if name in self._exact:
            yield from shared_out("frozen", name, self._exact[name])
        elif hasattr(parameter, "ds_tensor"):
            first, count = _shard(parameter)
            if count > 0:
                shape = _shape(parameter)
                rows_N = parameter.ds_tensor.detach()[:count]
                yield Piece("frozen", name, rows_N, math.prod(shape), first, shape=shape)
        else:
            yield from shared_out("frozen", name, parameter)

    def _restore_frozen(self, saved: Saved, name: str, parameter: nn.Parameter) -> None:
        if name in self._exact:
            self._exact[name].copy_(read_whole(saved, "frozen", name, _shape(parameter)))
        if hasattr(parameter, "ds_tensor"):
            first, count = _shard(parameter)
            if count > 0:
                parameter.ds_tensor.data[:count].copy_(saved.rows("frozen", name, first, count))
        else:
            parameter.copy_(read_whole(saved, "frozen", name, _shape(parameter)))

    def _restore_moments(self, saved: Saved, known: dict[str, set[str]], ranges: list[Range]) -> None:
        """The optimizer's state of a buffer; without any saved, as before its first step."""
        flat = ranges[0].flat
        self._optimizer.state.pop(flat, None)
        wanted = list(itertools.product(ranges, known))
        missing = [f"{part} of {held.name}" for held, part in wanted if held.name not in known[part]]
        if len(missing) == len(wanted):
            return
        if missing:
            raise UserError(f"checkpoint: has no {missing[0]}; resume with the optimizer that it was written with")
        state = {part: torch.zeros_like(flat.detach()) for part in known if part != _STEP}
        for held, part in itertools.product(ranges, state):
            held.load(saved, part, state[part])
        if _STEP in known:
            state[_STEP] = _one_step(saved, ranges)
        self._optimizer.state[flat] = state

    def _derive(self) -> None:
        """Makes from the masters what forwards use, as a step does. Collective."""
        if self._zero_stage == 3:
            for group in range(len(self._optimizer.fp16_groups)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
            self._gather_persistent()
            self._optimizer.invalidate_secondary_tensor()
        elif self._zero_stage > 0:
            self._optimizer.update_lp_params()

    def _gather_persistent(self) -> None:
        """Small weights that ZeRO 3 has whole between steps."""
        if persistent := self._optimizer.persistent_parameters:
            persistent[0].all_gather(persistent)

    def _check_names(self, saved: Saved) -> None:
        for part, trains in (("weights", True), ("frozen", False)):
            own = {name for name, p in self._stage.named_parameters() if p.requires_grad == trains}
            if differing := sorted(own.symmetric_difference(saved.names(part))):
                has, lacks = ("stage", "checkpoint") if differing[0] in own else ("checkpoint", "stage")
                kind = "trains" if trains else "is frozen"
                raise UserError(
                    f"checkpoint: {differing[0]} {kind} in the {has} and not in the {lacks}; resume with the"
                    " configuration that the checkpoint was written with"
                )


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Of the whole parameter: under ZeRO 3 it is an empty placeholder itself."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _shard(parameter: nn.Parameter) -> tuple[int, int]:
    """First element and number of elements of this rank's shard under ZeRO 3; the last ones hold padding too."""
    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    first = size * rank()
    return first, min(size, math.prod(_shape(parameter)) - first)


def _one_step(saved: Saved, ranges: list[Range]) -> Tensor:
    """The count of steps of parameters that are moved together."""
    steps = {held.name: float(saved.rows(_STEP, held.name, 0, 1)) for held in ranges}
    if len(set(steps.values())) > 1:
        raise UserError(
            f"checkpoint: {min(steps)} has made another number of steps than its group; resume at the engine.zero_stage"
            " that it was written at"
        )
    return torch.tensor(steps[ranges[0].name], dtype=torch.float32)
