"""What a measurement was made on and with, for the file that it is written to."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from reid_dist.revision import commit

PACKAGES = (
    *("torch", "triton", "numpy", "pillow", "simplejpeg", "webdataset", "deepspeed"),
    *("open_clip_torch", "cut-cross-entropy", "liger-kernel", "inf-cl", "quack-kernels"),
)


def describe_machine() -> dict[str, Any]:
    """Processor, usable cores, load, GPU, versions and commit."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
