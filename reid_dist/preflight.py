"""What must be alike on all ranks of a run, compared before any of them trains."""

import hashlib
import os
import platform
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from reid_dist import distributed
from reid_dist.config import RunConfig
from reid_dist.errors import UserError
from reid_dist.inputs import Inputs
from reid_dist.metrics import say
from reid_dist.revision import commit

LIBRARIES = ("torch", "deepspeed", "accelerate", "safetensors", "webdataset", "open_clip_torch", "numpy", "Pillow")
# Nothing depends on clocks, but logs of hosts that differ by more are hard to read side by side.
CLOCK_S = 30.0
# A rank of another program differs in almost everything; the first lines say enough.
MOST_LINES = 8


class Told(NamedTuple):
    """What one rank says of itself."""

    host: str
    facts: dict[str, str]
    clock: float  # seconds since 1970


def check_alike(config: RunConfig, inputs: Inputs, options: Mapping[str, str] = {}) -> None:
    """Compares program, libraries, settings and data of all ranks. Collective; warns of clocks that differ.

    Args:
        config: of this rank.
        inputs: that it has opened.
        options: of the command line, beside the settings.

    Raises:
        UserError: on every rank alike, one line for each fact that differs, naming ranks and hosts.
    """
    facts = {**gather_facts(config, inputs), **{f"option {name}": value for name, value in options.items()}}
    distributed.barrier()  # the clocks are read at one moment
    told: list[Told] = distributed.all_gather_object(Told(socket.gethostname(), facts, time.time()))
    problems = list(differences(told))
    if problems:
        more = [f"... and {len(problems) - MOST_LINES} more differences"] if len(problems) > MOST_LINES else []
        raise UserError("\n".join(problems[:MOST_LINES] + more))
    for line in late_clocks(told):
        say(line)


def gather_facts(config: RunConfig, inputs: Inputs) -> dict[str, str]:
    """This rank's facts by name; what only one rank of a host needs to find out is left to the first there."""
    facts = {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}}
    facts |= {f"setting {key}": value for key, value in _flat(config.model_dump(mode="json"))}
    for location, shards in inputs.shards.items():
        facts[f"manifest of {location}"] = _short_sha256(shards.manifest.model_dump_json())
    for stage, sources in inputs.streams.items():
        facts[f"streamed sets of {stage}"] = _short_sha256(repr([source.identity() for source in sources]))
    facts["word list"] = _short_sha256("\n".join(inputs.words))
    if os.environ.get("LOCAL_RANK", "0") == "0":
        facts["source files of reid_dist"] = _sources()
        facts["commit"] = commit() or ""
    return {name: value for name, value in facts.items() if value}


def differences(told: list[Told]) -> Iterator[str]:
    """One line for each fact in which ranks that know it differ; the value of most ranks counts as the right one."""
    for name in dict.fromkeys(name for each in told for name in each.facts):
        values = {rank: each.facts[name] for rank, each in enumerate(told) if name in each.facts}
        # Of equally many, the first rank's.
        expected = Counter(values.values()).most_common(1)[0][0]
        for value in dict.fromkeys(values.values()):
            if value != expected:
                odd = _who(told, [rank for rank, found in values.items() if found == value])
                like = next(rank for rank, found in values.items() if found == expected)
                yield f"{name}: {value} on {odd}, but {expected} on {_who(told, [like])}; {_remedy(name)}"


def late_clocks(told: list[Told]) -> Iterator[str]:
    """One line for each host whose clock is far from rank 0's."""
    ahead = {each.host: each.clock - told[0].clock for each in told}
    for host, seconds in ahead.items():
        if abs(seconds) > CLOCK_S:
            direction = "ahead of" if seconds > 0 else "behind"
            yield (
                f"warning: the clock of {host} is {abs(seconds):.0f} s {direction} that of {told[0].host}; training"
                " does not depend on it, times in logs do"
            )


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "not installed"


def _sources() -> str:
    """Digest of the package's own files: a node may have a copy of its own, and not from git."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _short_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys of settings; those of a stage by its name, as overrides have them."""
    for key, value in section.items():
        if isinstance(value, list) and all(isinstance(each, dict) and "name" in each for each in value):
            value = {each["name"]: each for each in value}
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def _who(told: list[Told], ranks: list[int]) -> str:
    """Such as `rank 1 (host b)` or `ranks 8, 9 (host b)`."""
    hosts = ", ".join(dict.fromkeys(told[rank].host for rank in ranks))
    shown = ", ".join(map(str, ranks[:MOST_LINES])) + (", ..." if len(ranks) > MOST_LINES else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown} (host {hosts})"


def _remedy(name: str) -> str:
    if name.startswith(("setting ", "option ")):
        return "start all ranks with the same command line"
    if name.startswith(("manifest", "streamed", "word list")):
        return "give all hosts the same files"
    if name in ("commit", "source files of reid_dist"):
        return "run the same state of the repository on all hosts"
    return "install the same version on all hosts"
