"""`launch/train.py` with faults: patched from outside, as the environment variable FAULTS says, and then run as it is.

FAULTS is a JSON list of {"rank", "stage", "step", "phase", "kind", ...}; RECORD a folder outside the run, where every
save leaves its digests. Without both it is `launch/train.py`.
"""

import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
CLOCKS = {"wait_seconds", "waited", "elapsed", "samples_per_s", "data_wait_percent", "memory_gib"}
SAVING = ("share", "write", "manifest", "rename", "latest", "purge", "removal")  # phases, by the step that is saved

here: dict[str, Any] = {"stage": "", "step": -1}
faults: list[dict[str, Any]] = []


def main(argv: list[str] | None = None) -> int:
    """As `launch/train.py`'s, with the faults planted."""
    from launch import train

    plant()
    train.PATIENCE = float(os.environ.get("PATIENCE", train.PATIENCE))  # what a launcher would not wait for
    return train.main(argv)


def plant() -> None:
    """Patches this process."""
    from reid_dist.distributed import environment_rank

    found = json.loads(os.environ.get("FAULTS", "[]"))
    faults.extend(fault for fault in found if fault.get("rank") in (None, environment_rank()))
    random.seed(0)  # nothing in training draws from these two: they are no part of what a run depends on
    np.random.seed(0)
    _record()
    _plant_steps()
    _plant_saves()
    _plant_handover()
    for fault in faults:
        if fault["phase"] == "begin":
            _do(fault)


def at(phase: str, step: int | None = None) -> None:
    """This rank is there: does what is planned for it."""
    step = here["step"] if step is None else step
    for fault in list(faults):
        there = fault.get("stage", here["stage"]), fault.get("step", step)
        if fault["phase"] == phase and there == (here["stage"], step):
            _do(fault)


def _do(fault: dict[str, Any]) -> None:
    if fault.get("once", True):
        faults.remove(fault)
    if met := fault.get("unless"):  # in one start only
        if Path(met).exists():
            return
        Path(met).touch()
    if mark := fault.get("mark"):  # the test acts
        Path(mark).touch()
    globals()[f"_{fault['kind']}"](fault)


def _kill(fault: dict[str, Any]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_launcher(fault: dict[str, Any]) -> None:
    """The process above this one, or the one above that, and so on: `levels` up."""
    pid = os.getpid()
    for _ in range(fault.get("levels", 1)):
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(pid, signal.SIGKILL)


def _signal(fault: dict[str, Any]) -> None:
    os.kill(os.getpid(), fault["number"])


def _twice(fault: dict[str, Any]) -> None:
    os.kill(os.getpid(), fault["number"])
    time.sleep(1.3)
    os.kill(os.getpid(), fault["number"])
    time.sleep(30)


def _sleep(fault: dict[str, Any]) -> None:
    time.sleep(fault["seconds"])


def _stop(fault: dict[str, Any]) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _hide_full_disk(fault: dict[str, Any]) -> None:
    real = os.statvfs
    os.statvfs = lambda path: type("Much", (), {"f_bavail": 1 << 30, "f_frsize": real(path).f_frsize})()


def _desync(fault: dict[str, Any]) -> None:
    import torch

    with torch.no_grad():
        dict(here["engine"].stage.named_parameters())[fault["name"]].view(-1)[0] += fault.get("by", 1e-6)


def _limit_memory(fault: dict[str, Any]) -> None:
    """No more address space than is in use, and little besides."""
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limit = used + fault["bytes"]
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _shift_clock(fault: dict[str, Any]) -> None:
    """The clock of the day is wrong from now on; the monotonic one is right."""
    real = time.time
    time.time = lambda: real() + fault["seconds"]


def _spoil(fault: dict[str, Any]) -> None:
    """The features of one sample, from `Stage.features`."""
    here["spoil"] = {**fault, "from": here["step"]}


def _scale_loss(fault: dict[str, Any]) -> None:
    here["loss_factor"] = fault["by"]


def _spoil_gradient(fault: dict[str, Any]) -> None:
    parameter = next(p for p in here["engine"].stage.parameters() if p.requires_grad)
    value = float(fault["value"])
    handle = parameter.register_hook(lambda gradient: (handle.remove(), gradient * value)[1])


def _omit(fault: dict[str, Any]) -> None:
    """Takes nothing up of one state when a checkpoint is restored; see `omissions`."""
    from tests.faults import omissions

    omissions.omit(fault["state"])


def _cut_file(fault: dict[str, Any]) -> None:
    os.truncate(fault["path"], int(fault["share"] * os.path.getsize(fault["path"])))


def _before(owner: Any, name: str, phase: str, step: Callable[..., int] | None = None) -> None:
    """`at(phase)` before each call of a function."""
    original = getattr(owner, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        at(phase, None if step is None else step(*arguments, **options))
        return original(*arguments, **options)

    setattr(owner, name, wrapped)


def _after(owner: Any, name: str, phase: str) -> None:
    """`at(phase)` after each call of a function."""
    original = getattr(owner, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        at(phase)
        return result

    setattr(owner, name, wrapped)


def _plant_steps() -> None:
    import torch

    from reid_dist import distributed, stage_training
    from reid_dist.data.loader import TrainLoader
    from reid_dist.data.stream.loader import StreamLoader
    from reid_dist.engine.deepspeed_engine import DeepSpeedEngine
    from reid_dist.models.momentum import MomentumEncoder
    from reid_dist.stages.base import Stage
    from reid_dist.stages.i2i import I2IStage
    from reid_dist.stages.pretrain import PretrainStage

    for loader in (TrainLoader, StreamLoader):
        _follow(loader)
    original = stage_training.train_stage

    def train_stage(run: Any, index: int, encoder: Any) -> Any:
        here.update(stage=run.config.stages[index].name, step=-1)
        at("stage")
        return original(run, index, encoder)

    sys.modules["reid_dist.recipe"].train_stage = train_stage  # type: ignore[attr-defined]
    for stage in (I2IStage, PretrainStage):
        _spoil_features(stage)
    _end_spoiling(Stage)
    _after(distributed.PackedGather, "__init__", "collective")  # it is on its way
    _before(DeepSpeedEngine, "backward", "backward")
    _hold_engine(DeepSpeedEngine)
    _before(DeepSpeedEngine, "step", "step")
    _after(torch.optim.AdamW, "step", "optimizer")  # own shares moved, the others' not here yet
    _before(Stage, "after_step", "after_step")
    _before(MomentumEncoder, "update", "update")  # the queue has the step's keys
    _skip_collective(distributed)


def _follow(loader: Any) -> None:
    original = loader.steps

    def steps(self: Any, start: int, stop: int) -> Iterator[Any]:
        for step, batches in enumerate(original(self, start, stop), start):
            here["step"] = step
            at("data")
            yield batches

    loader.steps = steps


def _hold_engine(engine: Any) -> None:
    original = engine.__init__

    def init(self: Any, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        here["engine"] = self

    engine.__init__ = init


def _spoil_features(stage: Any) -> None:
    original, original_loss = stage.features, stage.loss

    def features(self: Any, batch: Any, state: Any) -> Any:
        at("forward")
        found = original(self, batch, state)
        if fault := here.get("spoil"):
            chosen_B = batch["sample_id_B"] == batch["sample_id_B"][fault["row"]]
            x_BD = found["image_BD"]
            # As a sample whose features are not finite: where, because 0 x nan is nan too.
            found["image_BD"] = (x_BD * float(fault["value"])).where(chosen_B[:, None], x_BD)
        return found

    def loss(self: Any, *arguments: Any) -> Any:
        value, parts = original_loss(self, *arguments)
        return value * here.pop("loss_factor", 1.0), parts

    stage.features, stage.loss = features, loss


def _end_spoiling(stage: Any) -> None:
    """A sample is spoilt for so many steps, and when the guard looks at it again."""
    original = stage.prepare

    def prepare(self: Any, micro_batches: Any) -> Any:
        fault = here.get("spoil")
        if fault and here["step"] >= fault["from"] + fault.get("steps", 1):
            here.pop("spoil")
        return original(self, micro_batches)

    stage.prepare = prepare


def _skip_collective(distributed: Any) -> None:
    from reid_dist.checkpoint.writer import CheckpointWriter

    gather, save = distributed.dist.all_gather_into_tensor, CheckpointWriter.save

    def gather_or_not(*arguments: Any, **options: Any) -> Any:
        at("gather")
        if here.pop("skip", False):
            return type("Done", (), {"wait": lambda self: None})()
        return gather(*arguments, **options)

    def save_or_not(self: Any, step: int, *arguments: Any, **options: Any) -> None:
        at("save", step)
        if not here.pop("skip", False):
            save(self, step, *arguments, **options)

    distributed.dist.all_gather_into_tensor, CheckpointWriter.save = gather_or_not, save_or_not


def _skip(fault: dict[str, Any]) -> None:
    here["skip"] = True


def _plant_saves() -> None:
    from reid_dist.checkpoint import retention, writer

    def saved_step(*_: Any, **__: Any) -> int:
        name = threading.current_thread().name
        return int(name.split()[1]) if name.startswith("checkpoint ") else -1

    _before(writer, "_write_share", "share", saved_step)
    _before(writer.CheckpointWriter, "_complete", "manifest", saved_step)
    _before(writer, "replace_folder", "rename", saved_step)
    _before(writer, "write_latest", "latest", saved_step)
    _before(writer, "purge", "purge", saved_step)
    _before(retention.shutil, "rmtree", "removal", saved_step)
    original = os.write

    def write(descriptor: int, data: Any) -> int:
        step = saved_step()
        if step < 0 or not any(fault["phase"] == "write" for fault in faults):
            return original(descriptor, data)
        done = original(descriptor, data[: (len(data) + 1) // 2])
        at("write", step)
        return done

    os.write = write


def _plant_handover() -> None:
    recipe = sys.modules["reid_dist.recipe"]
    _before(recipe, "save_export", "export")
    _before(recipe, "purge_finished", "exported")
    _before(recipe, "evaluate", "evaluation")
    _after(recipe, "record_scores", "scored")


def _record() -> None:
    """Writes what each save is made of: digests of the parts, and hashes of this rank's own state without clocks."""
    folder = os.environ.get("RECORD")
    if not folder:
        return
    from reid_dist.checkpoint import writer
    from reid_dist.distributed import rank

    Path(folder).mkdir(parents=True, exist_ok=True)

    def note(line: dict[str, Any]) -> None:
        with Path(folder, f"rank-{rank()}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    original_dump, original_save = writer.dump, writer.CheckpointWriter.save

    def dump(manifest: Any) -> bytes:
        groups = [(sorted(group.names), group.lr, group.base_lr, group.weight_decay) for group in manifest.groups]
        parts = {**manifest.digests, "groups": hashlib.sha256(repr(sorted(groups)).encode()).hexdigest()}
        parts["loss"] = float(manifest.loss).hex() if manifest.loss is not None else None
        note({"stage": manifest.stage, "step": manifest.step, "parts": parts})
        return original_dump(manifest)

    def save(self: Any, step: int, pieces: Any, private: Any, record: Any, **options: Any) -> None:
        note({"stage": record["stage"], "step": step, "parts": _private_parts(private)})
        original_save(self, step, pieces, private, record, **options)

    writer.dump, writer.CheckpointWriter.save = dump, save  # type: ignore[method-assign]


def _private_parts(private: Any) -> dict[str, str]:
    import torch

    texts = {name: json.dumps(_without_clocks(value), sort_keys=True) for name, value in private.values.items()}
    hashes = {name: hashlib.sha256(text.encode()) for name, text in texts.items()}
    for name, x in sorted(private.tensors.items()):
        whole = hashes.setdefault(name.partition(".")[0], hashlib.sha256())
        whole.update(name.encode() + x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {name: whole.hexdigest() for name, whole in hashes.items()}


def _without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_clocks(x) for key, x in value.items() if key not in CLOCKS}
    return [_without_clocks(x) for x in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from reid_dist.supervision.leaving import leave
    from reid_dist.supervision.parents import die_with_parent

    die_with_parent()
    leave(main)
