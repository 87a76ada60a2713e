"""Training a stage without DeepSpeed: torch's DDP through Accelerate, or FSDP2 where ZeRO would shard.

The only file that imports accelerate.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from reid_dist.config import EngineConfig, OptimizerConfig
from reid_dist.distributed import local_device, world_size
from reid_dist.engine.base import Engine, stored_buffers
from reid_dist.engine.torch_shards import gather, local, pieces_of, release, shard, take, whole
from reid_dist.errors import UserError
from reid_dist.models.dual_encoder import MAX_LOGIT_SCALE
from reid_dist.optim import build_optimizer, parameter_groups, set_learning_rate, state_names
from reid_dist.pieces import Piece, Saved
from reid_dist.stages import Batch, Stage

_LOGIT_SCALE = "encoder.logit_scale"
T = TypeVar("T")


class TorchEngine(Engine):
    """One training stage in plain torch; a new one for each stage.

    `zero_stage` says what the ranks share out, as for DeepSpeed. 0: nothing, DDP. 1: the optimizer's state, and
    gradients once those of a step are complete: FSDP2 with all weights in one group, whole from the first forward of a
    step to its end. 2: gradients already during each backward: the same with a group for each block. 3: weights too,
    whole only while their block runs. Weights are fp32 in every precision.

    Args:
        stage: moved to this process's device, broadcast from rank 0 and, from ZeRO 1 on, partitioned.
        config: engine settings.
        optimizer: optimizer settings.
        micro_batch_size: samples per rank and accumulation step; of no importance here.

    Raises:
        UserError: nothing trains.
    """

    def __init__(self, stage: Stage, config: EngineConfig, optimizer: OptimizerConfig, micro_batch_size: int) -> None:
        self.stage = stage
        self.config = config
        self._device = local_device()
        self._micro_step = 0
        self._pending: Tensor | None = None
        self._last_norm: Tensor | None = None
        # The config refuses pure_bf16, of which optimizer moments would be rounded too.
        assert config.precision != "pure_bf16"
        groups = parameter_groups(stage.to(self._device).trainable(), optimizer)
        if not groups:
            raise UserError("freeze: nothing in this stage trains; unfreeze a tower")
        self._stored = list(stored_buffers(stage))  # asked later, FSDP2 would release all weights for it
        with _quiet_accelerate():
            self._accelerator = _accelerator(self._device, config.gradient_accumulation_steps)
            self._model: nn.Module = stage if config.zero_stage else self._accelerator.prepare_model(stage)
        if config.zero_stage:
            _broadcast(stage)
            shard(stage, config.zero_stage, self._device)
        # Under FSDP2 the shards, whatever the module holds at the moment.
        self._parameters = dict(stage.named_parameters())
        for group in groups:
            group["params"] = [self._parameters[name] for name in group["names"]]
        self._optimizer = build_optimizer(groups, optimizer)
        self._moments = state_names(optimizer)
        self._hold_logit_scale()

    def run(self, part: Callable[[Batch], T], batch: Batch) -> T:
        """See `Engine`."""
        with self._as_in_backward(), torch.autocast(self._device.type, torch.bfloat16, self.config.precision == "bf16"):
            result: T = self._model(batch, part)
        return result

    def backward(self, loss: Tensor) -> None:
        """See `Engine`."""
        self._pending = None
        with self._as_in_backward():
            self._accelerator.backward(loss)

    @contextlib.contextmanager
    def _as_in_backward(self) -> Iterator[None]:
        """Ranks exchange gradients in a step's last micro-batch; DDP must know in the forward already."""
        last = self._micro_step == self.config.gradient_accumulation_steps - 1
        if isinstance(self._model, FSDPModule):
            self._model.set_requires_gradient_sync(last or self.config.zero_stage > 1)
            yield
            return
        with contextlib.nullcontext() if last else self._accelerator.no_sync(self._model):
            yield

    @torch.no_grad()
    def pending_norm(self) -> Tensor:
        """See `Engine`."""
        if self._pending is None:
            norm = nn.utils.get_total_norm(self._gradients()).to(self._device)
            if self.config.zero_stage and world_size() > 1:
                squares = norm.square()
                dist.all_reduce(squares)
                norm = squares.sqrt()
            self._pending = norm
        return self._pending

    def step(self, skip: bool = False) -> bool:
        """See `Engine`."""
        self._micro_step = (self._micro_step + 1) % self.config.gradient_accumulation_steps
        if self._micro_step:
            return False
        if not skip:
            self._last_norm = self.pending_norm()
            self._clip(self._last_norm)
            release(self.stage)
            self._optimizer.step()
            self._hold_logit_scale()
        self._optimizer.zero_grad()
        self._pending = None
        return not skip

    def set_learning_rate(self, factor: float) -> None:
        """See `Engine`."""
        set_learning_rate(self._optimizer, factor)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """See `Engine`."""
        return list(self._optimizer.param_groups)

    @property
    def described(self) -> str:
        """See `Engine`."""
        zero = self.config.zero_stage
        return f"torch {f'FSDP2 as ZeRO {zero}' if zero else 'DDP'}, {self.config.precision}"

    @property
    def waits_in_forward(self) -> bool:
        """See `Engine`."""
        return self.config.zero_stage > 0

    def gradient_norm(self) -> float:
        """See `Engine`."""
        return 0.0 if self._last_norm is None else float(self._last_norm)

    @torch.no_grad()
    def exact_parameters(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """See `Engine`."""
        buffers = {name: self.stage.get_buffer(name) for name in self._stored}
        wanted = {*self._parameters, *buffers} if names is None else set(names)
        if foreign := wanted - self._parameters.keys() - buffers.keys():
            raise ValueError(f"the stage has no {', '.join(sorted(foreign))}")
        parameters: dict[str, Tensor] = dict(self._parameters)
        if self.config.zero_stage in (1, 2) and wanted & parameters.keys():
            gather(self.stage)  # the next forward finds them gathered
            parameters = dict(self.stage.named_parameters())
        for name, parameter in parameters.items():
            if name in wanted:
                yield name, whole(parameter.detach())
        for name, buffer in buffers.items():
            if name in wanted:
                yield name, buffer.detach()

    @contextlib.contextmanager
    def callable_modules(self) -> Iterator[None]:
        """See `Engine`."""
        gather(self.stage)
        yield
        release(self.stage)

    @torch.no_grad()
    def full_gradients(self) -> dict[str, Tensor]:
        """See `Engine`."""
        gradients = {name: (p, p.grad) for name, p in self._parameters.items() if p.requires_grad}
        return {
            name: torch.zeros(p.shape) if gradient is None else whole(gradient).to("cpu", copy=True)
            for name, (p, gradient) in gradients.items()
        }

    @torch.no_grad()
    def pieces(self) -> Iterator[Piece]:
        """See `Engine`."""
        for name, parameter in self._parameters.items():
            yield from pieces_of("weights" if parameter.requires_grad else "frozen", name, parameter)
            for part, value in self._optimizer.state.get(parameter, {}).items():
                if value is not None:
                    yield from pieces_of(part, name, value)

    @torch.no_grad()
    def restore(self, saved: Saved) -> None:
        """See `Engine`."""
        self._check_names(saved)
        release(self.stage)
        known = {part: set(saved.names(part)) for part in self._moments}
        for name, parameter in self._parameters.items():
            take(saved, "weights" if parameter.requires_grad else "frozen", name, parameter)
            self._optimizer.state.pop(parameter, None)
            if any(name in names for names in known.values()):  # else it has not had a gradient yet
                # Torch keeps the count on the CPU.
                state = {part: torch.zeros(()) if part == "step" else torch.zeros_like(parameter) for part in known}
                for part, value in state.items():
                    take(saved, part, name, value)
                self._optimizer.state[parameter] = state

    def _check_names(self, saved: Saved) -> None:
        for part, trains in (("weights", True), ("frozen", False)):
            own = {name for name, p in self._parameters.items() if p.requires_grad == trains}
            if differing := sorted(own.symmetric_difference(saved.names(part))):
                where, other = ("checkpoint", "stage") if differing[0] in own else ("stage", "checkpoint")
                raise UserError(
                    f"checkpoint: {differing[0]} is among the {part} of the {other} and not of the {where}; resume with"
                    " the configuration that it was written with"
                )

    def close(self) -> None:
        """See `Engine`."""
        self._optimizer.zero_grad()
        self._model = self.stage
        self._accelerator.free_memory()
        _forget_accelerate()

    def _gradients(self) -> list[Tensor]:
        """What this rank holds of the gradients."""
        return [local(p.grad) for p in self._parameters.values() if p.grad is not None]

    @torch.no_grad()
    def _clip(self, norm: Tensor) -> None:
        if self.config.max_grad_norm:
            factor = (self.config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            for gradient in self._gradients():
                gradient.mul_(factor)

    @torch.no_grad()
    def _hold_logit_scale(self) -> None:
        parameter = self._parameters[_LOGIT_SCALE]
        if parameter.requires_grad:
            local(parameter).clamp_(max=MAX_LOGIT_SCALE)


def _accelerator(device: torch.device, accumulation: int) -> Any:
    """An `Accelerator` for the process group that is there already."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    # Ranks keep their own BatchNorm statistics, as under DeepSpeed; stages leave parameters out of some batches.
    ddp = DistributedDataParallelKwargs(
        broadcast_buffers=False, find_unused_parameters=True, gradient_as_bucket_view=True
    )
    _forget_accelerate()
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no",  # `run` does that: theirs would cast what goes to `after_step` too
        gradient_accumulation_steps=accumulation,
        kwargs_handlers=[ddp],
    )


@contextlib.contextmanager
def _quiet_accelerate() -> Iterator[None]:
    """It sets variables and threads as it thinks best, and warns of both, and of a name that torch will change."""
    environment, threads = dict(os.environ), torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for added in os.environ.keys() - environment.keys():
            del os.environ[added]
        os.environ.update(environment)
        torch.set_num_threads(threads)


def _forget_accelerate() -> None:
    """Its settings outlive an `Accelerator` and would be the next stage's; the process group stays."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@torch.no_grad()
def _broadcast(stage: Stage) -> None:
    """Rank 0's weights and buffers to all, as DDP does it."""
    for tensor in (*stage.parameters(), *stage.buffers()):
        dist.broadcast(tensor.data, 0)
