"""Settings of how a run is kept alive: checkpoints, guards against bad numbers, supervision.

None of them changes weights, unless a guard steps in.
"""

from pydantic import Field

from reid_dist.config.section import NotNegative, Positive, Section


class CheckpointConfig(Section):
    """Checkpoints of a stage in training."""

    every: int = Field(1000, ge=0, description="optimizer steps between two; 0: only when the run is told to stop")
    keep: int = Field(2, gt=0, description="the newest so many stay")
    best: bool = Field(False, description="keep the one whose last point in the log has the least training loss, too")
    asynchronous: bool = Field(True, description="written beside the training, from a copy in main memory")


class GuardConfig(Section):
    """What a step may not be: a step that is not finite changes nothing, on any rank."""

    max_skips: int = Field(10, gt=0, description="steps in a row that may be skipped before the run ends")
    spike_sigma: NotNegative = Field(
        0.0, description="also skip losses and gradient norms so many deviations above the mean of the window; 0: none"
    )
    window: int = Field(128, gt=1, description="steps that mean and deviation are of")


class SupervisionConfig(Section):
    """What the ranks watch in each other."""

    # Below 600 s, when torch's process groups give up, without a name.
    hang_s: float = Field(480.0, gt=0, le=540, description="a run that stands still for so long says where, and ends")
    grace_s: Positive = Field(100.0, description="seconds from a signal to stop to the end, saved or not")
    desync_every: int = Field(0, ge=0, description="steps between comparisons of the ranks' weights; 0: none")
    slow_ratio: float = Field(
        0.75, ge=0, le=1, description="a rank slower than the median by this factor is named in the log; 0: none is"
    )
