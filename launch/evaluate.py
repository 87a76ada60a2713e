"""Scores trained models on benchmarks.

python launch/evaluate.py runs/unified --benchmarks cuhk_pedes market1501
python launch/evaluate.py runs/seed0 runs/seed1 runs/seed2 --benchmarks cuhk_pedes     # also mean and deviation
python launch/evaluate.py runs/a runs/b --benchmarks market1501 msmt17                 # also trained on x tested on
python launch/evaluate.py runs/a/i2i runs/a/t2i --benchmarks cuhk_pedes --select t2i.mAP
deepspeed --num_accelerators 2 launch/evaluate.py ...   or torchrun --nproc-per-node 2 launch/evaluate.py ...
srun -K0 python launch/evaluate.py ...   in a SLURM job; docs/evaluation.md says what to export before
"""

import argparse
import sys
import time
from pathlib import Path

from reid_dist.distributed import environment_rank, is_lost_peer, shutdown
from reid_dist.errors import UserError
from reid_dist.evaluate.command import Request, evaluate

INTERRUPTED = 130  # as shells say it


def parse_arguments(argv: list[str] | None = None) -> Request:
    """The command line; the launchers' --local_rank is accepted and ignored."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what is scored")
    what.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folder of a run (its last finished stage counts), of one of its stages, or an export",
    )
    what.add_argument(
        "--benchmarks",
        nargs="+",
        required=True,
        metavar="NAME",
        help="shard sets below --data, or folders or addresses of their own",
    )
    what.add_argument("--data", metavar="ROOT", help="folder of shard sets; default: data.root of the first run")
    what.add_argument("--split", choices=["test", "val"], default="test", help="default: test")
    what.add_argument(
        "--tasks",
        nargs="+",
        choices=["t2i", "i2t", "i2i"],
        default=[],
        help="text to image, image to text, image to image; default: all that a benchmark allows",
    )
    what.add_argument(
        "--rerank",
        nargs="+",
        default=[],
        metavar="HOW",
        help="rows beside plain cosine: jaccard (TextReID), k_reciprocal, or with parameters "
        "jaccard:neighbours=5,weight=0.05, k_reciprocal:k1=20,k2=6,weight=0.3",
    )
    what.add_argument(
        "--select",
        metavar="TASK.METRIC",
        help="t2i.mAP for example: scores all RUNs on the val split of the benchmarks, and only the best on test",
    )
    what.add_argument(
        "--again",
        action="store_true",
        help="score what is recorded too; without it a score of the same weights, data and parameters is read from the "
        "folder `evaluation` beside the model, so that a test split is asked once",
    )
    what.add_argument(
        "--allow-overlap", action="store_true", help="score although a model was trained on images of a benchmark"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results for machines")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="write a page with tables, curves and ranked images, and the results for machines; scores again",
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images per rank; default: 64")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    given = vars(parser.parse_args(argv))
    del given["local_rank"]
    return Request(**given)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0; 2 after one clear line on wrong input; 1 for a fault; 130 when interrupted."""
    request = parse_arguments(argv)
    try:
        evaluate(request)
    except UserError as error:
        return _ended(str(error), 2)
    except OSError as error:
        return _ended(str(error), 1)
    except KeyboardInterrupt:
        if environment_rank() == 0:
            print("evaluate.py: interrupted; scores so far are recorded, the same command goes on", file=sys.stderr)
        return INTERRUPTED
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        print(f"evaluate.py: rank {environment_rank()} stops because another rank ended", file=sys.stderr, flush=True)
        time.sleep(10)  # the exit code that the launcher should find is the other's
        return 1
    shutdown()
    return 0


def _ended(why: str, code: int) -> int:
    # Most wrong input is seen by all ranks alike, and the launcher ends all with the first: let rank 0 speak.
    if environment_rank() != 0:
        time.sleep(5)
    print(f"evaluate.py: {why}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
