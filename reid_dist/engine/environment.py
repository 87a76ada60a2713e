"""What this process takes from its surroundings: device, threads, and where DeepSpeed compiles and shares memory."""

import os
import sys
from pathlib import Path

import torch

from reid_dist.distributed import local_device


def prepare_environment() -> torch.device:
    """Sets what DeepSpeed reads from the environment, before it is imported; returns this process's device."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed compiles its CPU collectives at the first start: into this environment, with this environment's ninja.
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = scripts + os.pathsep + os.environ.get("PATH", "")
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
    return device
