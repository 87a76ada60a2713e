"""`launch/train.py` as a person runs it: wrong input gives one clear line and exit code 2, also under deepspeed.

That a recipe trains under the launcher shows test_quickstart.py. Where neither the launcher nor a fresh interpreter
matters, a forked process runs the script's `main`: it need not import for seconds what is imported here.
"""

import contextlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from launch import train
from reid_dist.data.reader import ShardSet
from reid_dist.distributed import free_port
from reid_dist.inputs import open_inputs, train_loader
from reid_dist.recipe_file import load_config

ROOT = Path(__file__).parents[2]
RECIPE = "configs/quickstart.yaml"


def command(config: str, *arguments: str) -> list[str]:
    return [sys.executable, "launch/train.py", config, *arguments]


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    return subprocess.run(arguments, cwd=ROOT, env=clean | environment, capture_output=True, text=True, timeout=200)


def run_forked(
    folder: Path, arguments: list[str], ranks: int = 1, end_with_first: bool = False, **environment: str
) -> list[subprocess.CompletedProcess[str]]:
    """The same of every rank, without a launcher; `end_with_first` ends all with rank 0, as launchers do."""
    context = multiprocessing.get_context("fork")
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} | environment
    processes = []
    for rank in range(ranks):
        own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(context.Process(target=train_and_exit, args=(folder / f"said{rank}", arguments, own)))
        processes[-1].start()
    for process in processes[: 1 if end_with_first else ranks]:
        process.join(timeout=100)
    for process in processes:
        process.kill()  # what still runs
        process.join()
    outputs = [[(folder / f"said{rank}.{stream}").read_text() for stream in ("out", "err")] for rank in range(ranks)]
    return [
        subprocess.CompletedProcess(arguments, process.exitcode or 0, *output)
        for process, output in zip(processes, outputs, strict=True)
    ]


def train_and_exit(said: Path, arguments: list[str], environment: dict[str, str]) -> None:
    """In a forked process: both streams into files, C's too; ends without what only the parent may do at its end."""
    os.chdir(ROOT)
    os.environ.update(environment)
    code = 1
    with open(f"{said}.out", "w") as out, open(f"{said}.err", "w") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = train.main(arguments)
            except BaseException:
                traceback.print_exc()
    os._exit(code)


def said(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("train.py: ")]


def data_overrides(tiny_world: Path, output_dir: Path) -> list[str]:
    return [
        f"output_dir={output_dir}",
        f"data.root={tiny_world}",
        f"model.vocabulary={tiny_world / 'vocabulary.txt'}",
        "data.global_batch_size=16",
        "max_steps=2",
        "evaluation={}",
    ]


def check_refusal(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result.stderr
    assert len(said(result)) == 1
    assert all(word in said(result)[0] for word in words), result.stderr
    assert "Traceback" not in result.stderr


def test_wrong_input_gives_one_clear_line_and_exit_code_2() -> None:
    check_refusal(run(command(RECIPE, "optimizer.lrr=1e-3")), "unknown key optimizer.lrr", "did you mean lr?")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([RECIPE, "data.root=/nowhere"], ["/nowhere/cuhk_pedes", "no such shard folder", "shards.write"]),
        (["configs/quickstrat.yaml"], ["configs/quickstrat.yaml", "cannot read"]),
    ],
)
def test_other_wrong_input(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    [result] = run_forked(tmp_path, arguments)
    check_refusal(result, *words)


def test_world_size_that_does_not_divide_the_batch(tiny_world: Path, tmp_path: Path) -> None:
    arguments = [RECIPE, *data_overrides(tiny_world, tmp_path / "run")]
    [result] = run_forked(tmp_path, arguments, WORLD_SIZE="3")
    check_refusal(result, "data.global_batch_size: 16 cannot be shared by world size 3", "nearest that work")


def test_two_ranks_of_a_wrong_recipe_speak_once(tiny_world: Path, tmp_path: Path) -> None:
    arguments = [RECIPE, *data_overrides(tiny_world, tmp_path / "run"), "data.root=/nowhere"]
    first, other = run_forked(tmp_path, arguments, ranks=2, end_with_first=True)
    check_refusal(first, "/nowhere", "no such shard folder")
    assert said(other) == []
    assert not (tmp_path / "run").exists()


def test_an_image_that_does_not_decode_stops_both_ranks(tiny_world: Path, tmp_path: Path) -> None:
    broken = tmp_path / "shards"
    shutil.copytree(tiny_world, broken, ignore=shutil.ignore_patterns("raw"))
    shards = ShardSet(broken / "generic")
    for entry in shards.index:
        with (broken / "generic" / shards.manifest.shards[entry["shard"]].name).open("r+b") as file:
            file.seek(int(entry["image_offset"]))
            file.write(b"\0" * 64)
    results = run_forked(tmp_path, [RECIPE, *data_overrides(broken, tmp_path / "run")], ranks=2)
    for result in results:
        check_refusal(result, "generic", "shard", "sample")
    assert not (tmp_path / "run" / "pretrain" / "export").exists()


def deepspeed(tiny_world: Path, output_dir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    launcher = [
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_accelerators", "2", "--master_port", str(free_port()),
        "launch/train.py", RECIPE, *data_overrides(tiny_world, output_dir), *overrides,
    ]  # fmt: skip
    return run(launcher)


def test_a_bad_image_of_one_rank_is_told_once_and_without_a_traceback(tiny_world: Path, tmp_path: Path) -> None:
    broken = tmp_path / "shards"
    shutil.copytree(tiny_world, broken, ignore=shutil.ignore_patterns("raw"))
    overrides = [*data_overrides(broken, tmp_path / "run"), "stages.pretrain.data.reader=index"]
    config = load_config(
        ROOT / RECIPE, [*overrides, f"model.architecture={ROOT / 'configs/models/row_conv_tiny.json'}"]
    )
    loader = train_loader(config, 0, open_inputs(config, 2), rank=1, world_size=2)
    shards = ShardSet(broken / "generic")
    sample = loader.step_rows(0)[-1]  # in the half of the first batch that rank 1 reads
    entry = shards.index[loader.samples.row_N[sample]]
    with (broken / "generic" / shards.manifest.shards[entry["shard"]].name).open("r+b") as file:
        file.seek(int(entry["image_offset"]))
        file.write(b"\0" * 64)
    before = set(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"))
    result = deepspeed(broken, tmp_path / "run", "stages.pretrain.data.reader=index")
    assert result.returncode == 2, result.stderr
    assert shards.key(int(loader.samples.row_N[sample])) in result.stderr
    assert "Traceback" not in result.stderr
    assert all("sample" in line or "another rank ended" in line for line in said(result))
    assert set(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*")) <= before


def test_dry_run_of_the_real_recipe_needs_no_data(tmp_path: Path) -> None:
    [result] = run_forked(tmp_path, ["configs/unified_vit_b16.yaml", "--dry-run"], WORLD_SIZE="8")
    assert result.returncode == 0, result.stderr
    assert "plan for 8 ranks" in result.stdout
    assert (
        "149,617,665" in result.stdout
    )  # CLIP ViT-B/16: 149,620,737 at 224x224, less 4 rows of the position embedding
    assert "architecture: ViT-B-16-quickgelu" in result.stdout
