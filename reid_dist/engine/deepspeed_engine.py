"""Training a stage under DeepSpeed ZeRO; the only file that imports deepspeed."""

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from reid_dist.config import EngineConfig, OptimizerConfig
from reid_dist.distributed import local_device, rank, sum_over_ranks, world_size
from reid_dist.engine.base import Engine
from reid_dist.engine.deepspeed_state import DeepSpeedState
from reid_dist.errors import UserError
from reid_dist.models.dual_encoder import MAX_LOGIT_SCALE
from reid_dist.optim import build_optimizer, parameter_groups, set_learning_rate, state_names
from reid_dist.pieces import Piece, Saved
from reid_dist.recipe_file import merge
from reid_dist.stages import Batch, Stage, StageOutput

_LOGIT_SCALE = "encoder.logit_scale"
# Elements. DeepSpeed's default of 5e8 takes up to 4 GB on every rank, whatever the model's size.
_REDUCE_BUCKET = 50_000_000
T = TypeVar("T")


def deepspeed_config(config: EngineConfig, micro_batch_size: int) -> dict[str, Any]:
    """The DeepSpeed dictionary of our settings; the user's raw keys win.

    Args:
        config: engine settings.
        micro_batch_size: samples per rank and accumulation step.
    """
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": {"stage": config.zero_stage, "reduce_bucket_size": _REDUCE_BUCKET},
        # torch's AdamW and SGD are elementwise, so sharding their state changes nothing.
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if config.zero_stage in (1, 2) and config.precision != "pure_bf16" and not config.max_grad_norm:
        # `pending_norm` has found it, with one collective for all groups, and decides alone about the step.
        derived["zero_optimization"]["compute_grad_norm"] = False
    if config.precision == "bf16":
        derived["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    if config.precision == "pure_bf16":
        derived["bf16"] = {"enabled": True}
    merged: dict[str, Any] = merge(derived, config.deepspeed)
    return merged


class DeepSpeedEngine(Engine):
    """One training stage under DeepSpeed ZeRO; a new one for each stage.

    Args:
        stage: moved to this process's device, broadcast from rank 0 and, under ZeRO 3, partitioned.
        config: engine settings.
        optimizer: optimizer settings.
        micro_batch_size: samples per rank and accumulation step.

    Raises:
        UserError: nothing trains, the precision does not run here, or a raw key has no checkpoints.
    """

    def __init__(self, stage: Stage, config: EngineConfig, optimizer: OptimizerConfig, micro_batch_size: int) -> None:
        import deepspeed

        _check_precision(stage, config)
        _check_placement(config)
        self.stage = stage
        self.config = config
        self._gradient_norm: Tensor | None = None
        self._pending_norm: Tensor | None = None
        self._stored = set(stage.state_dict())
        # Masters start from it, and frozen weights are exported as they came.
        self._exact = _copies_of_what_bf16_rounds(stage, config)
        groups = parameter_groups(stage.trainable(), optimizer)
        if not groups:
            raise UserError("freeze: nothing in this stage trains; unfreeze a tower")
        with _quiet_deepspeed():
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=stage,
                optimizer=build_optimizer(groups, optimizer),
                config=deepspeed_config(config, micro_batch_size),
                dist_init_required=False,
            )
        self._restore_masters()
        self._hold_logit_scale()
        self._state = DeepSpeedState(stage, self._optimizer, config.zero_stage, state_names(optimizer), self._exact)

    def __call__(self, batch: Batch) -> StageOutput:
        """See `Engine`."""
        output: StageOutput = self._engine(batch)
        return output

    def run(self, part: Callable[[Batch], T], batch: Batch) -> T:
        """`part(batch)` as a forward: under the engine's autocast and hooks."""
        result: T = self._engine(batch, part)
        return result

    def backward(self, loss: Tensor) -> None:
        """Backward of a micro-batch; gradients are averaged over ranks and accumulation steps."""
        self._engine.backward(loss)

    @torch.no_grad()
    def pending_norm(self) -> Tensor:
        """See `Engine`; inf also where its square is beyond fp32, as to DeepSpeed."""
        if self._pending_norm is None:
            # Where DeepSpeed holds them in bf16, as it does for pure_bf16, their squares would be sums of bf16.
            gradients = [gradient.float() for gradient in self._state.gradients()]
            square = nn.utils.get_total_norm(gradients).square().to(local_device())
            # At ZeRO 0 every rank has all of them.
            self._pending_norm = (sum_over_ranks(square) if self.config.zero_stage else square).sqrt()
        return self._pending_norm

    def step(self, skip: bool = False) -> bool:
        """See `Engine`.

        Raises:
            FloatingPointError: a gradient is not finite, and the step was to be made.
        """
        boundary = bool(self._engine.is_gradient_accumulation_boundary())
        if not boundary:
            self._engine.step()
            return False
        norm, self._pending_norm = self.pending_norm(), None
        if skip:
            self._skip()
            return False
        if not norm.isfinite():
            # DeepSpeed would make the step at ZeRO 0; elsewhere leave it out, but gradients in some buffers.
            raise FloatingPointError("the gradients are not finite: the step must be skipped, on all ranks")
        self._engine.step()
        self._gradient_norm = norm
        self._state.clear_shards()
        self._hold_logit_scale()
        return bool(self._engine.was_step_applied())

    def _skip(self) -> None:
        """A micro-batch that is counted, at a boundary that makes no step."""
        self._state.let_go()
        self._engine.set_gradient_accumulation_boundary(False)
        self._engine.step()
        self._engine._is_gradient_accumulation_boundary = None  # as at first: by the count of micro-batches

    def set_learning_rate(self, factor: float) -> None:
        """Sets every group to `factor` times its base learning rate."""
        set_learning_rate(self._optimizer, factor)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """See `Engine`."""
        return list(self._optimizer.param_groups)

    def gradient_norm(self) -> float:
        """See `Engine`; of the last step that was made."""
        return 0.0 if self._gradient_norm is None else float(self._gradient_norm)

    @torch.no_grad()
    def _restore_masters(self) -> None:
        """Puts the unrounded weights into DeepSpeed's fp32 masters, which it had made from bf16 copies. Collective."""
        for name, parameter in self.stage.named_parameters():
            if name in self._exact and parameter.requires_grad:
                _set_master(parameter, self._exact.pop(name).to(parameter.device))

    @torch.no_grad()
    def _hold_logit_scale(self) -> None:
        """Clamps the temperature where its fp32 truth lives; a clamp of the module's copy would be overwritten."""
        parameter = self.stage.encoder.logit_scale
        if not parameter.requires_grad:
            return
        for tensor in (parameter.data, *_masters(parameter)):
            tensor.clamp_(max=MAX_LOGIT_SCALE)
        if self.config.precision == "pure_bf16":
            self.stage.encoder.exact_logit_scale = self._exact_parameter(_LOGIT_SCALE, parameter)

    @torch.no_grad()
    def exact_parameters(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """fp32 parameters, then buffers, one by one on this process's device, whole whatever the ZeRO stage.

        What is whole here already comes without a copy: read it before the next, change nothing. Collective under
        ZeRO 3 and pure_bf16: all ranks ask for the same names and take all of them.

        Args:
            names: those wanted, in any order; all when None.

        Raises:
            ValueError: names that the stage does not have.
        """
        buffers = {name: buffer for name, buffer in self.stage.named_buffers() if name in self._stored}
        parameters = dict(self.stage.named_parameters())
        wanted = {*parameters, *buffers} if names is None else set(names)
        if foreign := wanted - parameters.keys() - buffers.keys():
            raise ValueError(f"the stage has no {', '.join(sorted(foreign))}")
        for name, parameter in parameters.items():
            if name in wanted:
                yield name, self._exact_parameter(name, parameter)
        for name, buffer in buffers.items():
            if name in wanted:
                yield name, buffer.detach()

    def full_gradients(self) -> dict[str, Tensor]:
        """fp32 averaged gradients on the CPU, whole on every rank; between the last backward and `step`. Collective."""
        from deepspeed.utils import safe_get_full_grad

        gradients: dict[str, Tensor] = {}
        for name, parameter in self.stage.named_parameters():
            if parameter.requires_grad:
                gradient = safe_get_full_grad(parameter)
                gradients[name] = torch.zeros_like(parameter) if gradient is None else gradient.float().cpu().clone()
        return gradients

    def _exact_parameter(self, name: str, parameter: nn.Parameter) -> Tensor:
        from deepspeed import zero
        from deepspeed.utils import safe_get_full_fp32_param

        if name in self._exact:
            return self._exact[name].to(parameter.device)
        zero_3 = self.config.zero_stage == 3
        if parameter.requires_grad and (zero_3 or self.config.precision == "pure_bf16"):
            # Under ZeRO 3 too: what autocast gathered for a forward, in bf16, may still be there, and would be taken.
            master: Tensor = safe_get_full_fp32_param(parameter)
            return master
        if zero_3:
            with zero.GatheredParameters([parameter]):
                return parameter.detach().clone()
        return parameter.detach()

    def pieces(self) -> Iterator[Piece]:
        """See `Engine`."""
        return self._state.pieces()

    def restore(self, saved: Saved) -> None:
        """See `Engine`."""
        self._state.restore(saved)
        self._hold_logit_scale()

    def close(self) -> None:
        """Lets go of the engine's hooks and buffers, so that the next stage can build its own."""
        self._engine.destroy()


def _check_precision(stage: Stage, config: EngineConfig) -> None:
    """DeepSpeed casts parameters and leaves buffers as they are, which torch's BatchNorm refuses on CPUs."""
    if config.precision != "pure_bf16" or local_device().type != "cpu":
        return
    for name, module in stage.named_modules():
        if isinstance(module, _BatchNorm):
            raise UserError(f"engine.precision: pure_bf16 does not run {name}, a BatchNorm, on a CPU; set bf16 or fp32")


def _check_placement(config: EngineConfig) -> None:
    """Raw keys that put state or gradients where neither checkpoints nor skipped steps look for them."""
    zero = config.deepspeed.get("zero_optimization") or {}
    for key in ("offload_optimizer", "offload_param", "round_robin_gradients"):
        if zero.get(key):
            raise UserError(f"engine.deepspeed.zero_optimization.{key}: cannot be saved and resumed; remove the key")


def _copies_of_what_bf16_rounds(stage: Stage, config: EngineConfig) -> dict[str, Tensor]:
    """fp32 copies, on the CPU, of weights that could only be read rounded.

    pure_bf16 casts all. ZeRO 3 gathers weights for an autocast forward in bf16 and may leave them there, where a later
    gather finds them; frozen weights have no master to read instead.
    """
    cast, gathered = config.precision == "pure_bf16", config.precision == "bf16" and config.zero_stage == 3
    return {
        name: parameter.detach().float().cpu().clone()
        for name, parameter in stage.named_parameters()
        if cast or (gathered and not parameter.requires_grad)
    }


def _set_master(parameter: nn.Parameter, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if not hasattr(parameter, "ds_tensor"):
        safe_set_full_fp32_param(parameter, value)
        return
    # Under ZeRO 3 that would cut past the end of a parameter that the ranks do not divide evenly.
    shard = parameter.ds_tensor.numel()
    padded = torch.zeros(shard * world_size(), device=value.device)
    padded[: value.numel()] = value.flatten()
    safe_set_local_fp32_param(parameter, padded[shard * rank() :][:shard])


def _masters(parameter: nn.Parameter) -> list[Tensor]:
    """This rank's pieces of a parameter that DeepSpeed keeps beside the module's own tensor, as views."""
    from deepspeed.utils import safe_get_local_fp32_param

    if hasattr(parameter, "ds_tensor"):
        return [parameter.ds_tensor.data, safe_get_local_fp32_param(parameter)]
    mapping = getattr(parameter, "_hp_mapping", None)
    return [] if mapping is None else [mapping.get_hp_fragment().data]


@contextlib.contextmanager
def _quiet_deepspeed() -> Iterator[None]:
    """DeepSpeed logs a page at each start; ours says what matters."""
    import logging

    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
