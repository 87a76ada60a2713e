from reid_dist.config import EngineConfig
from reid_dist.engine import deepspeed_config


def test_a_raw_key_leaves_its_neighbours_alone() -> None:
    """Replacing the whole of `zero_optimization` would switch ZeRO off in silence."""
    raw = {"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": True}
    found = deepspeed_config(EngineConfig(zero_stage=2, deepspeed=raw), micro_batch_size=4)
    assert found["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert (found["wall_clock_breakdown"], found["train_micro_batch_size_per_gpu"]) == (True, 4)


def test_a_raw_key_wins() -> None:
    found = deepspeed_config(EngineConfig(deepspeed={"gradient_clipping": 3.0}), micro_batch_size=4)
    assert found["gradient_clipping"] == 3.0
