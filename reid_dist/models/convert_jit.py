"""One-off conversion of OpenAI's TorchScript archives: `python -m reid_dist.models.convert_jit IN.pt OUT.safetensors`.

Loading TorchScript may run what the archive holds, so it happens once, by the user's own command, in a sub-process
whose environment is empty; training itself only reads tensors.
"""

import argparse
import subprocess
import sys
from pathlib import Path

_CHILD = """
import sys, torch
from safetensors.torch import save_file
state = torch.jit.load(sys.argv[1], map_location="cpu").state_dict()
save_file({name: value.contiguous().clone() for name, value in state.items()}, sys.argv[2])
"""


def convert(source: Path, target: Path) -> None:
    """Writes the tensors of a TorchScript archive as safetensors, under a temporary name first.

    Raises:
        RuntimeError: the sub-process failed; its last line is the message.
    """
    partial = target.with_name(target.name + ".partial")
    child = subprocess.run(
        [sys.executable, "-I", "-c", _CHILD, str(source.resolve()), str(partial.resolve())],
        env={},
        capture_output=True,
        text=True,
    )
    if child.returncode != 0:
        partial.unlink(missing_ok=True)
        raise RuntimeError(child.stderr.strip().splitlines()[-1] if child.stderr.strip() else "the converter failed")
    partial.rename(target)


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    if not arguments.source.is_file():
        print(f"convert_jit: {arguments.source} does not exist", file=sys.stderr)
        return 2
    try:
        convert(arguments.source, arguments.target)
    except RuntimeError as error:
        print(f"convert_jit: cannot convert {arguments.source}: {error}", file=sys.stderr)
        return 2
    print(f"wrote {arguments.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
