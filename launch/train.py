"""Trains a recipe: `deepspeed launch/train.py CONFIG [key.sub=value ...] [--dry-run]`.

Also `torchrun launch/train.py CONFIG`, or plain `python launch/train.py CONFIG` for one process.
"""

import argparse
import sys
import time
from pathlib import Path

from reid_dist.config import RunConfig
from reid_dist.distributed import environment_rank, is_lost_peer, shutdown
from reid_dist.engine import remove_shared_memory
from reid_dist.errors import DivergenceError, UserError
from reid_dist.plan import describe
from reid_dist.recipe import run
from reid_dist.recipe_file import dump_config, load_config


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; the launchers' --local_rank is accepted and ignored."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="recipe, a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings over those of the recipe")
    parser.add_argument("--dry-run", action="store_true", help="print settings, plan and memory estimate, then stop")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0; 2 after one clear line for each thing that is wrong with the input; 1 for a fault."""
    arguments = parse_arguments(argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.dry_run:
            if environment_rank() == 0:
                print(dump_config(config) + "\n" + describe(config))
            return 0
        return _train(config)
    except (UserError, DivergenceError) as error:
        # Most wrong input is seen by all ranks alike, and the launcher ends all with the first: let rank 0 speak.
        if environment_rank() != 0:
            time.sleep(5)
        print(f"train.py: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, UserError) else 1


def _train(config: RunConfig) -> int:
    try:
        run(config)
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        # The rank that left has said why, or was killed; its exit code is the one that the launcher should find.
        print(f"train.py: rank {environment_rank()} stops because another rank ended", file=sys.stderr, flush=True)
        remove_shared_memory()  # now: the launcher ends this process while it waits
        time.sleep(10)
        return 1
    finally:
        remove_shared_memory()
    shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
