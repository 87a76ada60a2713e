"""A stage behind call, backward, step and its gathered full tensors; one file for each backend."""

from importlib.util import find_spec

from reid_dist.config import EngineConfig, OptimizerConfig
from reid_dist.engine.base import Engine
from reid_dist.engine.environment import prepare_environment
from reid_dist.errors import UserError
from reid_dist.stages import Stage

__all__ = ["Engine", "build_engine", "prepare_environment", "require_backend"]

_PACKAGES = {"deepspeed": "deepspeed", "torch": "accelerate"}


def build_engine(stage: Stage, config: EngineConfig, optimizer: OptimizerConfig, micro_batch_size: int) -> Engine:
    """The engine of the configured backend, which is imported only now.

    Args:
        stage: moved to this process's device, broadcast from rank 0 and, where weights are sharded, partitioned.
        config: engine settings.
        optimizer: optimizer settings.
        micro_batch_size: samples per rank and accumulation step.

    Raises:
        UserError: nothing trains, the precision does not run here, or the backend is not installed.
    """
    require_backend(config)
    if config.backend == "torch":
        from reid_dist.engine.torch_engine import TorchEngine

        return TorchEngine(stage, config, optimizer, micro_batch_size)
    from reid_dist.engine.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(stage, config, optimizer, micro_batch_size)


def require_backend(config: EngineConfig) -> None:
    """Looks whether the backend's package is there, without importing it.

    Raises:
        UserError: it is not installed.
    """
    package = _PACKAGES[config.backend]
    if find_spec(package) is None:
        other = next(backend for backend in _PACKAGES if backend != config.backend)
        raise UserError(
            f"engine.backend: {config.backend} needs the package {package}, which is not installed; pip install"
            f" {package}, or set engine.backend={other}"
        )
