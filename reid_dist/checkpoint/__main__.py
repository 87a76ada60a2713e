"""Looks into checkpoints: `python -m reid_dist.checkpoint inspect|verify|export RUN_OR_CHECKPOINT`."""

import sys

from reid_dist.checkpoint.command import main

if __name__ == "__main__":
    sys.exit(main())
