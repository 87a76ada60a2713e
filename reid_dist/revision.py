"""Which state of the program made a result."""

import subprocess
from pathlib import Path


def commit() -> str | None:
    """The commit of the working tree, with a + where files differ from it; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        described = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return described.stdout.strip() or None
