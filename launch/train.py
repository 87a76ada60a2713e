"""Trains a recipe: `deepspeed launch/train.py CONFIG [key.sub=value ...] [--dry-run]`.

Also `torchrun launch/train.py CONFIG`, `srun python launch/train.py CONFIG`, or plain `python` for one process.
"""

import argparse
import sys
import time
from pathlib import Path

from reid_dist.config import dump_config, load_config
from reid_dist.distributed import environment_rank, shutdown
from reid_dist.errors import UserError


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; the launchers' --local_rank is accepted and ignored."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="recipe, a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings over those of the recipe")
    parser.add_argument("--dry-run", action="store_true", help="print settings, plan and memory estimate, then stop")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one clear line for each thing that is wrong with the input."""
    arguments = parse_arguments(argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.dry_run:
            from reid_dist.plan import describe

            print(dump_config(config) + "\n" + describe(config))
            return 0
        # Imported late: a typo in the recipe is told before torch and DeepSpeed take their seconds to load.
        from reid_dist.engine import remove_shared_memory
        from reid_dist.recipe import run

        try:
            run(config)
        finally:
            remove_shared_memory()
    except UserError as error:
        if environment_rank() != 0:
            # Most wrong input is seen by all ranks alike, and the launcher ends all with the first: let rank 0 speak.
            time.sleep(3)
        print(f"train.py: {error}", file=sys.stderr, flush=True)
        return 2
    shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
