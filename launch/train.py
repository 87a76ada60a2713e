"""Trains a recipe: `deepspeed launch/train.py CONFIG [key.sub=value ...] [--resume ...] [--dry-run]`.

Also `torchrun launch/train.py CONFIG`, or plain `python launch/train.py CONFIG` for one process. Started again after
any end, it goes on where it stood.
"""

import argparse
import errno
import sys
import time
from pathlib import Path

from reid_dist.config import RunConfig
from reid_dist.distributed import environment_rank, is_lost_peer, shutdown
from reid_dist.errors import CheckpointError, DivergenceError, NoMemoryError, NonFiniteError, Stopped, UserError
from reid_dist.exit_codes import ExitCode
from reid_dist.out_of_memory import is_out_of_memory, memory_line
from reid_dist.planning.memory import describe
from reid_dist.planning.report import describe_cluster
from reid_dist.recipe import run
from reid_dist.recipe_file import dump_config, load_config
from reid_dist.stage_training import Resume
from reid_dist.supervision.leaving import leave, record, remove_own_shared_memory
from reid_dist.supervision.parents import die_with_parent

# What all ranks raise alike, so that one of them need speak.
ALIKE = {
    CheckpointError: ExitCode.NO_CHECKPOINT,
    DivergenceError: ExitCode.DIVERGED,
    NonFiniteError: ExitCode.DIVERGED,
    Stopped: ExitCode.STOPPED,
}
DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# Seconds: of a rank whose end says less than another's. The launcher ends all with the first, and has its exit code.
PATIENCE = 5


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; the launchers' --local_rank is accepted and ignored."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="recipe, a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings over those of the recipe")
    parser.add_argument("--dry-run", action="store_true", help="print settings, plan and memory estimate, then stop")
    parser.add_argument("--plan", metavar="NODESxGPUS", help="print what to expect on so many, then stop")
    parser.add_argument("--plan-set", action="append", default=[], metavar="key=value", help="another assumption of it")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|must|never|CHECKPOINT",
        help="go on from what output_dir holds, if anything (auto); insist on it; refuse it; or from this checkpoint",
    )
    parser.add_argument(
        "--fallback", action="store_true", help="where a checkpoint is damaged, go on from the newest good one"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args(argv)
    if arguments.plan_set and arguments.plan is None:
        parser.error("--plan-set: assumptions of --plan NODESxGPUS; add it")
    if arguments.plan is not None and arguments.dry_run:
        parser.error("--plan and --dry-run: two different plans; give one of them")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, see `reid_dist.exit_codes`; one clear line for each thing that is wrong."""
    arguments = parse_arguments(argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.dry_run:
            if environment_rank() == 0:
                print(dump_config(config) + "\n" + describe(config))
            return ExitCode.DONE
        if arguments.plan is not None:
            if environment_rank() == 0:
                print(describe_cluster(config, arguments.plan, arguments.plan_set))
            return ExitCode.DONE
        return _train(config, Resume(arguments.resume, arguments.fallback))
    except UserError as error:
        # Most wrong input is seen by all ranks alike: let rank 0 speak.
        if environment_rank() != 0:
            time.sleep(PATIENCE)
        _say(str(error))
        return ExitCode.WRONG_INPUT
    except tuple(ALIKE) as error:
        if environment_rank() == 0:
            _say(str(error))
        return ALIKE[type(error)]
    except NoMemoryError as error:
        _say(str(error))
        return ExitCode.OUT_OF_MEMORY
    except OSError as error:
        if error.errno not in DISK_REFUSES:
            raise
        _say(f"rank {environment_rank()}: {error}; make room, or choose another output_dir")
        return ExitCode.NO_CHECKPOINT


def _train(config: RunConfig, resume: Resume) -> int:
    try:
        run(config, resume)
    except Exception as error:
        if is_out_of_memory(error) and not isinstance(error, NoMemoryError):
            raise NoMemoryError(memory_line(error, None)) from error
        if not is_lost_peer(error):
            raise
        # A collective may fail, and then a loader whose processes the launcher ends: all for want of the other rank.
        # The rank that left has said why, or was killed; its exit code is the one that the launcher should find.
        _say(f"rank {environment_rank()} stops because another rank ended")
        record(ExitCode.LOST_PEER)  # now: the launcher ends this process while it waits
        remove_own_shared_memory()
        time.sleep(2 * PATIENCE)
        return ExitCode.LOST_PEER
    finally:
        remove_own_shared_memory()
    shutdown()
    return ExitCode.DONE


def _say(line: str) -> None:
    print(f"train.py: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    die_with_parent()
    leave(main)
