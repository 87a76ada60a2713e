"""The shape of the house: who may import whom (design.md section 2), read from the imports, not from running them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The longest entry that fits a module counts.
FLOORS = {
    "reid_dist": 6,  # the package's own __init__: what it offers as a library
    "reid_dist.errors": 0,
    "reid_dist.files": 0,
    "reid_dist.digest": 0,
    "reid_dist.exit_codes": 0,
    "reid_dist.supervision": 2,
    "reid_dist.guard": 4,
    "reid_dist.consistency": 4,
    "reid_dist.slow_ranks": 1,
    "reid_dist.out_of_memory": 1,
    "reid_dist.preflight": 6,
    "reid_dist.training_state": 5,
    "reid_dist.pieces": 1,
    "reid_dist.revision": 0,
    "reid_dist.config": 0,
    "reid_dist.recipe_file": 1,
    "reid_dist.distributed": 0,
    "reid_dist.kernels": 1,
    "reid_dist.data.sample": 1,
    "reid_dist.data": 2,
    "reid_dist.models": 2,
    "reid_dist.models.word_gru": 3,
    "reid_dist.models.word_sources": 3,
    "reid_dist.losses": 2,
    "reid_dist.optim": 2,
    "reid_dist.evaluation.similarity": 2,
    "reid_dist.evaluation.counting": 2,
    "reid_dist.evaluation.ranking": 2,
    "reid_dist.evaluation.nearest": 2,
    "reid_dist.evaluation.sharing": 2,
    "reid_dist.evaluation.reranking": 2,
    "reid_dist.evaluation.chance": 2,
    "reid_dist.evaluation.baselines": 2,
    "reid_dist.evaluation": 3,
    "reid_dist.stages": 3,
    "reid_dist.report": 4,
    "reid_dist.engine": 4,
    "reid_dist.checkpoint": 4,
    "reid_dist.metrics": 4,
    "reid_dist.trained": 5,
    "reid_dist.trainer": 6,
    "reid_dist.stage_training": 7,
    "reid_dist.ledger": 4,
    "reid_dist.inputs": 5,
    "reid_dist.scoring": 6,
    "reid_dist.evaluate": 6,
    "reid_dist.heat_maps": 6,
    "reid_dist.search": 6,  # of trained models, as export is
    "reid_dist.export": 6,
    "reid_dist.recipe": 8,
    "reid_dist.step_memory": 5,
    "reid_dist.planning": 7,
    "reid_dist.benchmarks": 9,
    "reid_dist.claims": 10,  # says what it was measured on as the benchmarks do
}
# External packages that only these files may import.
RESERVED = {
    "deepspeed": {"reid_dist/engine/deepspeed_engine.py"},
    "accelerate": {"reid_dist/engine/torch_engine.py"},
    "triton": {"reid_dist/kernels/contrastive_triton.py"},
}
# Every file can refuse its input, those of floor 0 too; in return this one imports nothing of ours.
FOR_ALL = "reid_dist.errors"
# What is written must be read back: the contract of a sample, and to compare sets (shards/checking/overlap.py) the
# very pixels and exclusion lists that training will use. Not the loader or the sampler: shards know of no training.
SHARDS_MAY_IMPORT = {
    "reid_dist.errors",
    "reid_dist.data.sample",
    "reid_dist.data.reader",
    "reid_dist.data.remote",
    "reid_dist.data.byte_ranges",
    "reid_dist.data.tokenizer",
    "reid_dist.data.transforms",
    "reid_dist.data.cache",
    "reid_dist.data.exclude",
    "reid_dist.data.contamination",
}
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}


def python_files(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, at the head of a file or inside a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from reid_dist import distributed` names a module, `from reid_dist.config import X` an object in one.
                yield node.lineno, f"{module}.{alias.name}" if is_module(f"{module}.{alias.name}") else module


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    name = module_name(path)
    return imports(path.read_text(), name if path.name == "__init__.py" else name.rpartition(".")[0])


def floor(module: str) -> int | None:
    while module not in FLOORS:
        module, dot, _ = module.rpartition(".")
        if not dot:
            return None
    return FLOORS[module]


def same_folder(a: str, b: str) -> bool:
    """Both inside one folder below reid_dist/; the files at its top are rooms of their own."""
    return a.split(".")[:2] == b.split(".")[:2] and (ROOT / "reid_dist" / a.split(".")[1]).is_dir()


def upward_edges(module: str, found: Iterator[tuple[int, str]]) -> list[str]:
    own = floor(module)
    assert own is not None
    edges = []
    for line, target in found:
        if not target.startswith("reid_dist.") or target in (module, FOR_ALL):
            continue
        theirs = floor(target)
        if theirs is None:
            edges.append(f"line {line}: {target} has no floor")
        elif theirs > own or (theirs == own and not same_folder(module, target)):
            edges.append(f"line {line}: {module} (floor {own}) imports {target} (floor {theirs})")
    return edges


@pytest.mark.parametrize("path", python_files("reid_dist"), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_from_lower_floors_or_its_own_folder(path: Path) -> None:
    module = module_name(path)
    # `reid_dist` itself is an entry, so a new file at the top would silently be on its floor.
    assert module == "reid_dist" or any(
        f"{module}.".startswith(f"{name}.") for name in FLOORS if name != "reid_dist"
    ), f"give {module} a floor in FLOORS"
    assert upward_edges(module, imports_of(path)) == []


def test_what_all_may_import_imports_nothing_of_ours() -> None:
    path = ROOT.joinpath(*FOR_ALL.split(".")).with_suffix(".py")
    assert [name for _, name in imports_of(path) if name.split(".")[0] in ("reid_dist", "shards", "launch")] == []


@pytest.mark.parametrize("package", sorted(RESERVED))
def test_only_its_own_file_imports(package: str) -> None:
    files = [path for folder in ("reid_dist", "shards", "launch") for path in python_files(folder)]
    users = {
        str(path.relative_to(ROOT)) for path in files for _, name in imports_of(path) if name.split(".")[0] == package
    }
    assert users <= RESERVED[package]


def test_deepspeed_is_imported_by_the_engine() -> None:
    """The test above reads real imports: this one it must find, and it stands inside a function."""
    assert any(
        name.startswith("deepspeed") for _, name in imports_of(ROOT / "reid_dist" / "engine" / "deepspeed_engine.py")
    )


@pytest.mark.parametrize("path", python_files("shards"), ids=lambda path: str(path.relative_to(ROOT)))
def test_shards_imports_only_the_contract_of_the_data(path: Path) -> None:
    ours = {name for _, name in imports_of(path) if name.split(".")[0] in ("reid_dist", "launch", "tests")}
    assert ours <= SHARDS_MAY_IMPORT


@pytest.mark.parametrize("path", python_files("reid_dist"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_package_imports_neither_launchers_nor_tests(path: Path) -> None:
    foreign = {name for _, name in imports_of(path) if name.split(".")[0] in ("launch", "tests", "shards")}
    # The quickstart and the claims build their worlds and shards.
    builds = module_name(path).startswith(("reid_dist.benchmarks", "reid_dist.claims"))
    allowed = {"shards"} if builds else set()
    assert {name.split(".")[0] for name in foreign} <= allowed


def test_no_file_has_a_name_that_says_nothing() -> None:
    files = [path for folder in ("reid_dist", "shards", "launch", "tests") for path in python_files(folder)]
    assert [str(path) for path in files if {path.stem, *path.relative_to(ROOT).parts[:-1]} & EMPTY_NAMES] == []


def test_every_file_begins_by_saying_what_it_is_for() -> None:
    files = [path for folder in ("reid_dist", "shards", "launch") for path in python_files(folder)]
    assert [str(path) for path in files if not ast.get_docstring(ast.parse(path.read_text()))] == []


def test_floors_name_only_what_design_knows_or_what_exists() -> None:
    planned = {"guard", "preflight", "training_state", "consistency"}
    absent = {name for name in FLOORS if not is_module(name)}
    assert {name.removeprefix("reid_dist.") for name in absent} <= planned


# The reader itself


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import deepspeed", "deepspeed"),
        ("import reid_dist.engine as e", "reid_dist.engine"),
        ("from reid_dist import engine", "reid_dist.engine"),
        ("from reid_dist.engine import Engine", "reid_dist.engine"),
        ("from ..engine import Engine", "reid_dist.engine"),
        ("from . import i2i", "reid_dist.stages.i2i"),
        ("def f():\n    if True:\n        from reid_dist.engine import Engine", "reid_dist.engine"),
        ("try:\n    import triton.language\nexcept ImportError:\n    pass", "triton.language"),
    ],
)
def test_the_reader_sees_every_form_of_import(source: str, expected: str) -> None:
    assert [name for _, name in imports(source, "reid_dist.stages")] == [expected]


def test_an_upward_edge_is_found() -> None:
    edges = upward_edges(
        "reid_dist.losses.contrastive", imports("from reid_dist.stages.i2i import I2IStage", "reid_dist.losses")
    )
    assert edges == ["line 1: reid_dist.losses.contrastive (floor 2) imports reid_dist.stages.i2i (floor 3)"]
    sideways = imports("from reid_dist.models.heads import BNNeck", "reid_dist.losses")
    assert upward_edges("reid_dist.losses.contrastive", sideways) != []
    own = imports("from reid_dist.stages.base import Stage", "reid_dist.stages")
    assert upward_edges("reid_dist.stages.i2i", own) == []
    assert upward_edges("reid_dist.checkpoint", imports("from reid_dist import engine", "reid_dist")) != []
