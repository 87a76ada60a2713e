"""What a checkpoint would be without one of its states: on restoring it is left as a fresh run has it.

The program's own comparison of digests after a restore is kept from ending the run; what it would have said is printed.
"""

from collections.abc import Callable
from typing import Any

import torch

# State -> the stage in which a run with it left out is resumed.
STATES = {
    "torch's random numbers": "pretrain",
    "place in the stream": "pretrain",
    "counts of bad samples": "pretrain",
    "weights": "i2i",
    "exp_avg": "i2i",
    "exp_avg_sq": "i2i",
    "Adam's step": "i2i",
    "queue": "i2i",
    "key encoders": "i2i",
    "class centres": "i2i",
    "moments of class centres": "i2i",
    "BatchNorm's statistics": "i2i",
    "weight decay of a group": "i2i",
    "learning rate of a group": "i2i",
    "history of the guard": "i2i",
    "sums of the log": "i2i",
    "steps of the queue": "i2i",
    "steps of the stage": "i2i",
    "steps of the class centres": "i2i",
}


def omit(state: str) -> None:
    """Patches this process so that the next restore takes nothing up of a state."""
    _let_checks_pass()
    _PLANTED[state]()


def _let_checks_pass() -> None:
    from reid_dist import training_state

    original = training_state._check_digests

    def check(*arguments: Any) -> None:
        try:
            original(*arguments)
        except RuntimeError as error:
            print(f"own check: {error}", flush=True)

    training_state._check_digests = check


def _rows(part: str, name: str | None = None) -> Callable[[], None]:
    """Rows of a part come as zeros, as optimizers begin."""

    def plant() -> None:
        from reid_dist.checkpoint.reader import Checkpoint

        original = Checkpoint.rows

        def rows(self: Checkpoint, of: str, its: str, *place: int) -> torch.Tensor:
            found = original(self, of, its, *place)
            return torch.zeros_like(found) if of == part and name in (None, its) else found

        Checkpoint.rows = rows  # type: ignore[method-assign]

    return plant


def _nothing(module: str, owner: str, method: str) -> Callable[[], None]:
    def plant() -> None:
        import importlib

        setattr(getattr(importlib.import_module(module), owner), method, lambda *_, **__: None)

    return plant


def _weights() -> None:
    from reid_dist.engine.deepspeed_state import Range

    original = Range.load

    def load(self: Range, saved: Any, part: str, like_flat: torch.Tensor) -> None:
        if part != "weights":
            original(self, saved, part, like_flat)

    Range.load = load  # type: ignore[method-assign]


def _centres(names: Callable[[str], bool]) -> Callable[[], None]:
    def plant() -> None:
        from reid_dist.models.sharded_classifier import ShardedClassifier

        original = ShardedClassifier.restore

        def restore(self: ShardedClassifier, saved: Any, steps: int) -> None:
            before = {name: x.clone() for name, x in self.rows().items()}
            original(self, saved, steps)
            for name, x in self.rows().items():
                if names(name):
                    x.copy_(before[name])

        ShardedClassifier.restore = restore  # type: ignore[method-assign]

    return plant


def _counter(name: str) -> Callable[[], None]:
    def plant() -> None:
        from reid_dist.stages.i2i import I2IStage

        original = I2IStage.restore

        def restore(self: I2IStage, saved: Any, counters: dict[str, int]) -> None:
            assert counters[name] > 0
            original(self, saved, {**counters, name: 0})

        I2IStage.restore = restore  # type: ignore[method-assign]

    return plant


def _group(key: str, factor: float) -> Callable[[], None]:
    def plant() -> None:
        from reid_dist.engine.deepspeed_engine import DeepSpeedEngine

        original = DeepSpeedEngine.restore

        def restore(self: DeepSpeedEngine, saved: Any) -> None:
            original(self, saved)
            group = next(group for group in self._optimizer.param_groups if group["weight_decay"])
            group[key] *= factor

        DeepSpeedEngine.restore = restore  # type: ignore[method-assign]

    return plant


def _buffers() -> None:
    from reid_dist import training_state

    original, restore = training_state.stored_buffers, training_state.TrainingState.restore

    def without(self: training_state.TrainingState, checkpoint: Any) -> None:
        training_state.stored_buffers = lambda stage: {}  # type: ignore[assignment]
        restore(self, checkpoint)
        training_state.stored_buffers = original

    training_state.TrainingState.restore = without  # type: ignore[method-assign]


def _place() -> None:
    from reid_dist.data.stream.loader import StreamLoader

    original = StreamLoader.__init__

    def init(self: StreamLoader, *arguments: Any) -> None:
        *others, position = arguments
        original(self, *others, None)
        if position is not None:
            self._position.step = position["step"]
            self._position.seen, self._position.bad = position["seen"], position["bad"]

    StreamLoader.__init__ = init  # type: ignore[method-assign]


def _counts() -> None:
    from reid_dist.data.stream.loader import StreamLoader

    original = StreamLoader.__init__

    def init(self: StreamLoader, *arguments: Any) -> None:
        *others, position = arguments
        original(self, *others, position if position is None else {**position, "seen": 0, "bad": 0})

    StreamLoader.__init__ = init  # type: ignore[method-assign]


def _random() -> None:
    from reid_dist import training_state

    training_state._restore_random = lambda *_: None


def _log() -> None:
    from reid_dist.metrics import StageLog

    original = StageLog.load

    def load(self: StageLog, state: dict[str, Any], *arguments: Any) -> None:
        original(self, {**state, "sums": {}, "history": []}, *arguments)

    StageLog.load = load  # type: ignore[method-assign]


_PLANTED: dict[str, Callable[[], None]] = {
    "torch's random numbers": _random,
    "place in the stream": _place,
    "counts of bad samples": _counts,
    "weights": _weights,
    "exp_avg": _rows("exp_avg"),
    "exp_avg_sq": _rows("exp_avg_sq"),
    "Adam's step": _rows("step"),
    "queue": _nothing("reid_dist.models.queue_ring", "Ring", "restore"),
    "key encoders": _nothing("reid_dist.models.momentum", "MomentumEncoder", "restore"),
    "class centres": _centres(lambda name: name == "weight"),
    "moments of class centres": _centres(lambda name: name != "weight"),
    "BatchNorm's statistics": _buffers,
    "weight decay of a group": _group("weight_decay", 0.0),
    "learning rate of a group": _group("base_lr", 0.5),
    "history of the guard": _nothing("reid_dist.guard", "Guard", "load"),
    "sums of the log": _log,
    "steps of the queue": _counter("commits"),
    "steps of the stage": _counter("steps"),
    "steps of the class centres": _counter("classifier"),
}
