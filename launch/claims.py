"""Measures the methods' claims: `python launch/claims.py --world claims --seeds 5 [--only C1,D1] [--fast] --json OUT`.

Every arm of the experiments is a training run on the procedural world, on CPU or GPU; the claims are judged on paired
seeds. Interrupted or called again, it continues: what is complete is not trained again.
"""

import os
import sys

# One thread for each process, said before torch starts any; the seeds run beside each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from reid_dist.claims.command import main

if __name__ == "__main__":
    sys.exit(main())
