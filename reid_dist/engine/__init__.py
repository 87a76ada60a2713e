"""A stage behind call, backward, step and its gathered full tensors; one file for each backend."""

from reid_dist.config import EngineConfig, OptimizerConfig
from reid_dist.engine.base import Engine
from reid_dist.engine.environment import prepare_environment, remove_shared_memory
from reid_dist.stages import Stage

__all__ = ["Engine", "build_engine", "prepare_environment", "remove_shared_memory"]


def build_engine(stage: Stage, config: EngineConfig, optimizer: OptimizerConfig, micro_batch_size: int) -> Engine:
    """The engine of the configured backend, which is imported only now.

    Args:
        stage: moved to this process's device, broadcast from rank 0 and, where weights are sharded, partitioned.
        config: engine settings.
        optimizer: optimizer settings.
        micro_batch_size: samples per rank and accumulation step.

    Raises:
        UserError: nothing trains, or the precision does not run here.
    """
    from reid_dist.engine.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(stage, config, optimizer, micro_batch_size)
