"""Runs arms: each is a recipe of its own, and what is complete is skipped."""

import contextlib
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from reid_dist.claims.arms import CAPTIONED, IMAGES, UNSEEN, Arm, Task
from reid_dist.claims.worlds import VOCABULARY_FILE, Sizes, build_world
from reid_dist.config import RunConfig, StageConfig
from reid_dist.data.tokenizer import read_vocabulary
from reid_dist.errors import Stopped, UserError
from reid_dist.files import write_json
from reid_dist.models.architecture import read_architecture
from reid_dist.models.word_gru import build_dictionary
from reid_dist.models.word_sources import TowerSource
from reid_dist.recipe import run
from reid_dist.recipe_file import load_config
from reid_dist.scoring import RERANKED, read_scores

STAGE = "train"  # of the recipe: the one that arms change
SMALL_VIT = "configs/models/vit_tiny.json"
COST_FILE = "cost.json"
DICTIONARY_FILE = "words.safetensors"
# Where a task's scores are: of which of the evaluator's tasks, and on which set.
_EVALUATED: dict[Task, tuple[str, str]] = {
    "t2i": ("t2i", CAPTIONED),
    "i2i": ("i2i", IMAGES),
    "unseen": ("t2i", UNSEEN),
    "reranked": (RERANKED, CAPTIONED),
}


@dataclass(frozen=True)
class Settings:
    """What all arms share.

    Attributes:
        recipe: the YAML file.
        overrides: of it, from the command line.
        folder: of all runs.
        level: of the world.
        sizes: of the world.
    """

    recipe: Path
    overrides: tuple[str, ...]
    folder: Path
    level: str
    sizes: Sizes

    def seed_folder(self, seed: int) -> Path:
        """Where everything of a seed is."""
        return self.folder / f"seed{seed}"

    def world(self, seed: int) -> Path:
        """The data of a seed."""
        return self.seed_folder(seed) / "world"

    def run_folder(self, arm: str, seed: int) -> Path:
        """Where an arm runs."""
        return self.seed_folder(seed) / arm

    def export(self, arm: str, seed: int) -> Path:
        """The weights of a finished arm."""
        return self.run_folder(arm, seed) / STAGE / "export"


@dataclass(frozen=True)
class Job:
    """The arms of one seed that one process runs one after the other."""

    settings: Settings
    seed: int
    arms: tuple[Arm, ...]


@functools.cache
def check_recipe(settings: Settings) -> RunConfig:
    """The recipe as it stands.

    Raises:
        UserError: it is wrong in itself, or its last stage is not the one that the arms change.
    """
    config = load_config(settings.recipe, settings.overrides)
    stage = config.stages[-1]
    if stage.name != STAGE or not stage.steps:
        raise UserError(f"{settings.recipe}: the last stage must be named {STAGE} and have steps: arms are made of it")
    return config


def arm_config(settings: Settings, arm: Arm, seed: int) -> RunConfig:
    """The resolved settings of an arm.

    Raises:
        UserError: settings that do not go together, with the arm's name.
    """
    recipe = check_recipe(settings)
    steps = arm_stage(recipe).steps
    world = settings.world(seed)
    model: dict[str, Any] = {"vocabulary": str(world / VOCABULARY_FILE), **arm.model}
    if arm.transformer:
        model |= _with_blocks(arm, recipe.model.architecture)
    if arm.weights is not None:
        model["weights"] = str(settings.export(arm.weights, seed))
    if arm.visual is not None:
        model["visual_weights"] = str(settings.export(arm.visual, seed))
    if arm.dictionary is not None:
        words = settings.run_folder(arm.name, seed) / DICTIONARY_FILE
        model["word_gru"] = {**model["word_gru"], "dictionary": str(words)}
    stage = {"evaluation": _evaluation(arm), **arm.stage, "steps": max(1, round(steps * arm.length))}
    changes = [f"output_dir={settings.run_folder(arm.name, seed)}", f"seed={seed}", f"data.root={world}"]
    changes += [f"model.{key}={json.dumps(value)}" for key, value in model.items()]
    changes += [f"stages.{STAGE}.{key}={json.dumps(value)}" for key, value in stage.items()]
    try:
        return load_config(settings.recipe, [*settings.overrides, *changes])
    except UserError as error:
        raise UserError(f"arm {arm.name}: {error}") from error


def _with_blocks(arm: Arm, architecture: str) -> dict[str, Any]:
    """The architecture of an arm that needs blocks, and its prompts, in no more blocks than there are."""
    if "layers" not in read_architecture(architecture)["vision_cfg"]:
        architecture = SMALL_VIT
    found: dict[str, Any] = {"architecture": architecture}
    if "prompts" in arm.model:
        described = read_architecture(architecture)
        layers = {"visual_depth": described["vision_cfg"]["layers"], "text_depth": described["text_cfg"]["layers"]}
        depths = {key: min(arm.model["prompts"][key], most) for key, most in layers.items()}
        found["prompts"] = {**arm.model["prompts"], **depths}
    return found


def arm_stage(config: RunConfig) -> StageConfig:
    """The stage of an arm's settings that trains."""
    return config.stages[-1]


def arm_scores(settings: Settings, arm: Arm, seed: int) -> dict[Task, dict[str, float]]:
    """Metrics of a finished arm by task."""
    scores = read_scores(settings.run_folder(arm.name, seed), STAGE)
    found: dict[Task, dict[str, float]] = {}
    for task in arm.scored:
        kind, name = _EVALUATED[task]
        found[task] = scores[kind][name]
    return found


def _evaluation(arm: Arm) -> dict[str, Any]:
    wanted: dict[str, Any] = {"t2i": [], "i2i": []}
    for task in arm.scored:
        kind, name = _EVALUATED[task]
        if kind == RERANKED:
            wanted["rerank"] = {}  # as published
        else:
            wanted[kind].append(name)
    return wanted


def run_job(job: Job, progress: Callable[[int], Any]) -> None:
    """Runs the arms of a job; builds the seed's world first, unless it is there.

    Args:
        job: what to do.
        progress: called with the optimizer steps of each arm that is done.

    Raises:
        UserError: wrong settings or data, with seed and arm.
        OSError: a full disk and the like, likewise.
        RuntimeError: any other fault of an arm, with the file of its output.
    """
    _stand_alone()
    settings, seed = job.settings, job.seed
    logs = settings.seed_folder(seed) / "logs"
    with _into(logs / "world.log"):
        size = check_recipe(settings).model.image_size
        build_world(settings.world(seed), settings.level, settings.sizes, seed, size)
    for arm in job.arms:
        log = logs / f"{arm.name}.log"
        config = arm_config(settings, arm, seed)
        try:
            with _into(log):
                seconds = _run_arm(settings, arm, config, seed)
        except Stopped as error:
            raise KeyboardInterrupt from error
        except UserError as error:
            raise UserError(f"seed {seed}, arm {arm.name}: {error}") from error
        except OSError as error:
            raise OSError(f"seed {seed}, arm {arm.name}: {error}") from error
        except Exception as error:
            raise RuntimeError(f"seed {seed}, arm {arm.name} failed, see {log}: {error}") from error
        progress(config.stage_steps(arm_stage(config)))
        if not sys.stderr.isatty():
            print(_line(settings, arm, seed, seconds), flush=True)


def _stand_alone() -> None:
    """Makes this process a world of one, whatever its parent or a launcher has left in the environment."""
    # Its own lock is shared by processes, and one that is ended would leave it behind.
    tqdm.set_lock(threading.RLock())
    if not torch.distributed.is_initialized():
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)


def _run_arm(settings: Settings, arm: Arm, config: RunConfig, seed: int) -> float | None:
    """Seconds that it took; None when it had been trained before, whatever a stop left to be done."""
    trained = settings.export(arm.name, seed).exists()
    wall, processor = time.perf_counter(), time.process_time()
    if arm.dictionary is not None:
        words = read_vocabulary(settings.world(seed) / VOCABULARY_FILE)
        source = TowerSource(str(settings.export(arm.dictionary, seed)), None, None)
        build_dictionary(words, source, settings.run_folder(arm.name, seed) / DICTIONARY_FILE)
    run(config)
    if trained:
        return None
    seconds = time.perf_counter() - wall
    cost = {"seconds": round(seconds, 1), "cpu_seconds": round(time.process_time() - processor, 1)}
    write_json(settings.run_folder(arm.name, seed) / COST_FILE, cost)
    return seconds


def _line(settings: Settings, arm: Arm, seed: int, seconds: float | None) -> str:
    scores = ", ".join(
        f"{task} R1 {found['R1']:.1f} mAP {found['mAP']:.1f}" for task, found in arm_scores(settings, arm, seed).items()
    )
    return f"seed {seed} {arm.name}: {scores} ({'complete' if seconds is None else f'{seconds:.0f} s'})"


@contextlib.contextmanager
def _into(path: Path) -> Iterator[None]:
    """Everything that this process prints goes into a file, what libraries print beside Python's streams included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    try:
        # Line by line: both ways into the file keep their order.
        with path.open("a", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield
    finally:
        for descriptor, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)
