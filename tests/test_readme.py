"""Every command in README.md and docs/ names things that exist: scripts, modules, recipes, settings, converters."""

import importlib.util
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from launch import train
from launch.benchmark import BENCHMARKS
from launch.evaluate import parse_arguments
from launch.search import command_parser
from reid_dist.claims.command import claims_parser
from reid_dist.export.command import export_parser
from reid_dist.recipe_file import load_config
from shards.write import CONVERTERS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page.name, line.split(" #")[0].strip()) for line in lines if line.split("#")[0].strip()]
    return found


def test_there_are_commands_to_check() -> None:
    assert len(commands()) >= 8


def check_training(words: list[str]) -> None:
    arguments = train.parse_arguments([word for word in words if word != "…"])
    load_config(arguments.config, arguments.overrides)


def check_job(kind: str, words: list[str]) -> None:
    if kind == "train":
        check_training(words)
    elif kind == "evaluate":
        parse_arguments(words)
    else:
        assert words[0] in CONVERTERS


@pytest.mark.parametrize(("page", "command"), commands())
def test_command_names_what_exists(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    if not words:
        return  # a variable for the commands that follow
    program, rest = words[0], words[1:]
    if program == "bash":
        assert subprocess.run(["bash", "-n", rest[0]], check=False).returncode == 0
    elif program == "python" and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]) is not None
        if rest[1] == "shards.write":
            assert rest[2] in CONVERTERS
    elif rest[0] == "launch/benchmark.py":
        assert rest[1] in BENCHMARKS
    elif rest[0] == "launch/claims.py":
        claims_parser().parse_intermixed_args(rest[1:])
    elif rest[0] == "launch/search.py":
        command_parser().parse_args(rest[1:])
    elif rest[0] == "launch/export.py":
        export_parser().parse_args(rest[1:])
    elif "launch/evaluate.py" in rest:
        parse_arguments(rest[rest.index("launch/evaluate.py") + 1 :])
    elif program in ("deepspeed", "torchrun", "python", "srun"):
        check_training(rest[rest.index("launch/train.py") + 1 :])
    elif program == "sbatch":
        script = next(word for word in rest if not word.startswith("-"))
        assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
        check_job(Path(script).stem, rest[rest.index(script) + 1 :])
    elif program in ("tensorboard", "pip", "git", "cd", "sudo", "apt-get", "export", "printf"):
        pass
    else:
        pytest.fail(f"{page}: this test does not know {program!r}; teach it, or change the command")


@pytest.mark.parametrize("name", CONVERTERS)
def test_every_converter_is_in_the_table_of_data_sets(name: str) -> None:
    converter = CONVERTERS[name]
    line = next(
        line for line in (ROOT / "docs" / "shards.md").read_text().splitlines() if line.startswith(f"| `{name}` |")
    )
    assert converter.CARD["title"] in line
    assert converter.CARD["licence"] in line
    if len(converter.EXPECTED) > 1:
        assert all(f"`{variant}`" in line for variant in converter.EXPECTED)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
