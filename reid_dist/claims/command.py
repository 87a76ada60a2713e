"""The command line of the claims."""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from reid_dist.claims.arms import Arm, Claim, arms_of, chains
from reid_dist.claims.matrix import ARMS, SHARED, find_claims
from reid_dist.claims.report import claims_table, write_report
from reid_dist.claims.results import collect
from reid_dist.claims.running import Job, Settings, arm_config, arm_stage, check_recipe, run_job
from reid_dist.claims.worlds import Sizes
from reid_dist.distributed import shutdown
from reid_dist.errors import UserError
from shards.command import exit_code
from shards.workers import processors, run_jobs
from shards.world.spec import LEVELS

_FAST_SEEDS = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the claims; returns the exit code: 2 for wrong input, 1 for a full disk and the like, 128 + a signal."""
    arguments = claims_parser().parse_intermixed_args(argv)
    return exit_code(lambda: _run(arguments), "; run the same command again to continue", last=argv is None)


def claims_parser() -> argparse.ArgumentParser:
    """Arguments of `launch/claims.py`."""
    parser = argparse.ArgumentParser(prog="claims.py", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings over those of the recipe")
    parser.add_argument("--recipe", type=Path, default=Path("configs/claims.yaml"), help="what all arms share")
    parser.add_argument("--world", choices=list(LEVELS), default="claims", help="level of the procedural world")
    parser.add_argument("--ids", type=int, default=400, help="captioned training people; the rest in proportion")
    parser.add_argument("--seeds", type=int, help="number of seeds, from 0 on (default 5; with --fast 2)")
    parser.add_argument("--only", default="", metavar="C1,D1", help="claims to run (default: all)")
    parser.add_argument("--fast", action="store_true", help="the cheapest arms, for regression")
    parser.add_argument("--runs", type=Path, default=Path("runs/claims"), help="folder of all runs")
    parser.add_argument("--workers", type=int, default=processors(), help="arms at a time (default: all processors)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="file of the results; a .md and a .png go beside it")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    claims = find_claims([name.strip() for name in arguments.only.split(",") if name.strip()])
    seeds = range(_checked(arguments))
    settings = Settings(
        arguments.recipe, tuple(arguments.overrides), arguments.runs, arguments.world, Sizes.of(arguments.ids)
    )
    arms = _arms(claims, arguments.fast)
    check_recipe(settings)
    for arm in arms:
        arm_config(settings, arm, 0)
    _prepare_processes(arguments.workers)
    for phase in _jobs(settings, arms, seeds):
        _run_phase(phase, arguments.workers)
    shutdown()
    results = collect(settings, claims, arms, seeds, fast=arguments.fast)
    print(claims_table(results))
    if arguments.json is not None:
        print("written: " + ", ".join(map(str, write_report(results, arguments.json))))
    return 0


def _checked(arguments: argparse.Namespace) -> int:
    """The number of seeds.

    Raises:
        UserError: numbers or places that cannot be.
    """
    seeds: int = arguments.seeds if arguments.seeds is not None else _FAST_SEEDS if arguments.fast else 5
    for name, value, least in (("seeds", seeds, 1), ("workers", arguments.workers, 1), ("ids", arguments.ids, 4)):
        if value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    if arguments.json is not None and arguments.json.suffix != ".json":
        raise UserError(f"--json {arguments.json}: name a file that ends in .json; a .md and a .png go beside it")
    if arguments.runs.exists() and not arguments.runs.is_dir():
        raise UserError(f"--runs {arguments.runs}: is a file; name a folder")
    return seeds


def _arms(claims: Sequence[Claim], fast: bool) -> list[Arm]:
    arms = arms_of(claims, ARMS, fast)
    if not arms:
        names = ", ".join(claim.name for claim in claims)
        raise UserError(f"--fast --only {names}: nothing of these is in the short version; leave out --fast")
    return arms


def _jobs(settings: Settings, arms: Sequence[Arm], seeds: Sequence[int]) -> list[list[Job]]:
    """What every arm starts from, then the rest, longest first so that the processes end together."""
    first = [Job(settings, seed, tuple(arm for arm in arms if arm.name in SHARED)) for seed in seeds]
    rest = [Job(settings, seed, tuple(chain)) for chain in chains(arms, SHARED) for seed in seeds]
    return [first, rest]


def _prepare_processes(workers: int) -> None:
    """The processes share the cores: one thread each (see `engine.prepare_environment`)."""
    os.environ["LOCAL_WORLD_SIZE"] = str(processors())
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def _run_phase(jobs: Sequence[Job], workers: int) -> None:
    steps = sum(arm_stage(arm_config(job.settings, arm, job.seed)).steps for job in jobs for arm in job.arms)
    bar = tqdm(total=steps, unit="step", desc="claims", disable=not sys.stderr.isatty())
    with bar, closing(run_jobs(run_job, jobs, min(workers, len(jobs)), bar.update)) as finished:
        for _ in finished:
            pass
