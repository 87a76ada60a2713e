"""Fixtures of all tests: one thread per process, and functions run as ranks of a real gloo process group."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Several ranks share the cores, and a process that never started OpenMP's threads can be forked safely.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A run divides the cores by it, in the ranks that tests fork too: one thread each.
os.environ.setdefault("LOCAL_WORLD_SIZE", str(os.cpu_count()))

import gc
import importlib
import io
import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from reid_dist import distributed
from reid_dist.config import RunConfig
from reid_dist.engine import prepare_environment
from reid_dist.recipe_file import load_config
from tests import toy_shards
from tests.recipe_text import RECIPE

ROOT = Path(__file__).parents[1]

prepare_environment()
torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Autograd counts the devices at a process's first backward; one that counted a GPU must not be forked any more.
    # Fake tensors pretend that there is one from their first use on: counted before it, there is none.
    torch.ones((), requires_grad=True).backward()


def _rank_main(
    pipe: Connection, rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        distributed.initialize(torch.device("cpu"), timeout_s=60)
        # Serialised here: torch would pass tensors as file descriptors of a process that is about to end.
        buffer = io.BytesIO()
        torch.save(function(*args), buffer)
        pipe.send(("result", buffer.getvalue()))
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
    finally:
        pipe.close()
        # No atexit handlers: they belong to the parent that was forked.
        os._exit(0)


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 240) -> list[Any]:
    """Runs `function(*args)` on `world_size` forked gloo ranks; returns their results in rank order.

    A rank's traceback is raised here; all ranks are gone when this returns.
    """
    context = multiprocessing.get_context("fork")
    port = distributed.free_port()
    ranks = []
    # DeepSpeed collects garbage with every optimizer under ZeRO 3: ranks need not look at all that was imported here.
    gc.freeze()
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_rank_main, args=(sender, rank, world_size, port, function, args))
        process.start()
        sender.close()
        ranks.append((process, receiver))
    gc.unfreeze()
    deadline = time.monotonic() + timeout_s
    results = []
    try:
        for rank, (_, receiver) in enumerate(ranks):
            if not receiver.poll(max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"rank {rank} of {world_size} gave no result in {timeout_s} s")
            kind, value = receiver.recv()
            if kind == "error":
                raise AssertionError(f"rank {rank} of {world_size} failed:\n{value}")
            results.append(torch.load(io.BytesIO(value), weights_only=True))
    finally:
        for process, _ in ranks:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        _remove_shared_memory(port)
    return results


def _remove_shared_memory(port: int) -> None:
    """DeepSpeed leaves a 66 MB file for each rank; its name ends in the port and the rank."""
    for file in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        file.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The procedural world in small: shard sets cuhk_pedes, market1501 and generic, and vocabulary.txt."""
    from reid_dist.data.reader import ShardSet
    from reid_dist.data.tokenizer import count_words, write_vocabulary
    from shards.world.export import export
    from shards.world.spec import LEVELS, ExportSpec, World
    from shards.write import write

    root = tmp_path_factory.mktemp("tiny_world")
    level = LEVELS["quickstart"]
    world = World(3, level["hardness"], int(level["siblings"]), level["coverage"], level["wrong"])
    for converter, name, count in (
        ("cuhk_pedes",) * 2 + (16,),
        ("market1501",) * 2 + (16,),
        ("img2dataset", "generic", 48),
    ):
        export(ExportSpec(converter, world, count, 8, 0, 6, 0.4), root / "raw" / name, 1)
        # A stream needs a tar for each of its readers.
        write(converter, root / "raw" / name, root / name, shard_bytes=30_000 if name == "generic" else 64_000_000)
    write_vocabulary(count_words([ShardSet(root / "cuhk_pedes"), ShardSet(root / "generic")]), root / "vocabulary.txt")
    return root


@pytest.fixture(scope="session")
def deepspeed_imported() -> None:
    """For files whose ranks train: what DeepSpeed imports with its first optimizer, torch's compiler, takes seconds.

    Ranks that are forked later have it then, and what DeepSpeed finds out about this machine by compiling.
    """
    importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    if not torch.cuda.is_available():  # it would ask a GPU too, and who has asked one must not be forked
        assert importlib.import_module("deepspeed.ops").__compatible_ops__


@pytest.fixture(scope="session")
def tiny_recipe(tiny_world: Path) -> Callable[..., RunConfig]:
    """`tiny_recipe(output_dir, *overrides)`: the quickstart recipe on the tiny world, in batches of 16."""

    def make(output_dir: Path, *overrides: str) -> RunConfig:
        changes = [
            f"output_dir={output_dir}",
            f"data.root={tiny_world}",
            f"model.vocabulary={tiny_world / 'vocabulary.txt'}",
            f"model.architecture={ROOT / 'configs' / 'models' / 'row_conv_tiny.json'}",
            "data.global_batch_size=16",
            "log_every=1",
        ]
        return load_config(ROOT / "configs" / "quickstart.yaml", [*changes, *overrides])

    return make


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A file of `recipe_text.RECIPE`, three stages."""
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session", name="run_ranks")
def _run_ranks() -> Callable[..., list[Any]]:
    return run_ranks


@pytest.fixture(name="write_set")
def _write_set() -> Callable[..., Path]:
    return toy_shards.write_set
