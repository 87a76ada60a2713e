"""Recipes as YAML files: dotted overrides, and all problems reported at once with the nearest valid name.

`defaults < YAML < key.sub=value`.
"""

import difflib
import types
import typing
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from reid_dist.config import STAGE_CONFIGS, RunConfig, StageConfig
from reid_dist.errors import UserError

SHARED_SECTIONS = ("data", "engine", "optimizer", "evaluation")


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a recipe and applies `key.sub=value` overrides.

    Raises:
        UserError: every problem found, one a line, each naming the file and the key.
    """
    raw = _read_yaml(path)
    for text in overrides:
        _apply_override(raw, text, path)
    problems = [*_unknown_keys(raw, path), *_unseen_defaults(raw, path)]
    try:
        config = RunConfig.model_validate(_with_stage_defaults(raw))
    except ValidationError as error:
        # What is told already, with the nearest name, is not told again.
        told = ("extra_forbidden", "union_tag_invalid") if problems else ()
        problems += _messages(error, raw, path, told)
    if problems:
        raise UserError("\n".join(problems))
    return config


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back unchanged."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML in which a repeated key is an error instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if not isinstance(key, Hashable):
                continue  # the parent class tells
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(), Loader=_UniqueKeyLoader)  # noqa: S506 (a SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the recipe: {getattr(error, 'strerror', error)}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys, such as `model:` and `stages:`")
    return raw


def _apply_override(raw: dict[str, Any], text: str, path: Path) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"{text!r} on the command line: overrides have the form key.sub=value")
    try:
        parsed = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        raise UserError(f"{text!r} on the command line: the value is not valid YAML") from error
    parts = key.split(".")
    target: Any = raw
    if parts[0] == "stages" and len(parts) > 2:
        target = _stage_of(raw, parts[1], path)
        parts = parts[2:]
    for part in parts[:-1]:
        if target.get(part) is None:
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            raise UserError(f"{text!r} on the command line: {part} is not a section of {path}")
    target[parts[-1]] = parsed


def _stage_of(raw: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    stages = [stage for stage in raw.get("stages") or [] if isinstance(stage, dict)]
    for stage in stages:
        if stage.get("name") == name:
            return stage
    raise UserError(
        f"stages.{name}: {path} has no stage {name!r}{_nearest(name, [str(s.get('name')) for s in stages])}"
    )


def _with_stage_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """Moves the shared top-level sections into every stage, below the stage's own values."""
    run = {key: value for key, value in raw.items() if key not in SHARED_SECTIONS}
    if not isinstance(run.get("stages"), list):
        return run
    run["stages"] = [
        _complete_stage(stage, {key: raw[key] for key in SHARED_SECTIONS if key in raw})
        if isinstance(stage, dict)
        else stage
        for stage in run["stages"]
    ]
    return run


def _complete_stage(stage: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    stage = merge(defaults, stage)
    stage.setdefault("kind", stage.get("name"))
    return stage


def merge(base: Any, over: Any) -> Any:
    """Nested mappings laid over each other key by key; any other value of `over` replaces that of `base`."""
    if isinstance(base, dict) and isinstance(over, dict):
        return base | {key: merge(base[key], value) if key in base else value for key, value in over.items()}
    return over


def _unknown_keys(raw: dict[str, Any], path: Path) -> Iterator[str]:
    """One line for each key that no section knows, with the nearest name that exists."""
    top = {**_fields(RunConfig), **{key: _fields(StageConfig)[key] for key in SHARED_SECTIONS}}
    stages = raw.get("stages")
    yield from _unknown_below({k: v for k, v in raw.items() if k != "stages"}, top, "", path)
    for stage in stages if isinstance(stages, list) else []:
        if isinstance(stage, dict):
            kind = str(stage.get("kind", stage.get("name")))
            if kind not in STAGE_CONFIGS:
                yield f"{path}: stages: unknown stage {kind!r}{_nearest(kind, list(STAGE_CONFIGS))}"
                continue
            known = _fields(STAGE_CONFIGS[kind])
            yield from _unknown_below(stage, known, f"stages.{stage.get('name')}.", path)


def _unseen_defaults(raw: dict[str, Any], path: Path) -> Iterator[str]:
    """One line for each wrong top-level default that validation cannot see, because every stage has its own."""
    stages = raw.get("stages")
    own = [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
    for key in SHARED_SECTIONS:
        if key in raw and not isinstance(raw[key], dict) and all(key in stage for stage in own):
            yield f"{path}: {key}: should be a mapping of keys, not {raw[key]!r}"


def _unknown_below(raw: dict[str, Any], known: dict[str, Any], prefix: str, path: Path) -> Iterator[str]:
    for key, value in raw.items():
        if key not in known:
            yield f"{path}: unknown key {prefix}{key}{_nearest(str(key), list(known))}"
        elif isinstance(value, dict) and isinstance(known[key], type) and issubclass(known[key], BaseModel):
            yield from _unknown_below(value, _fields(known[key]), f"{prefix}{key}.", path)


def _fields(section: type[BaseModel]) -> dict[str, Any]:
    """Field name -> its annotation with `| None` removed."""
    return {name: _not_none(field.annotation) for name, field in section.model_fields.items()}


def _not_none(annotation: Any) -> Any:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        options = [option for option in typing.get_args(annotation) if option is not type(None)]
        return options[0] if len(options) == 1 else annotation
    return annotation


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"


def _messages(error: ValidationError, raw: dict[str, Any], path: Path, told: Sequence[str]) -> Iterator[str]:
    """One line for each problem not of a `told` type; a key that only the top level holds is named there, once."""
    seen = set()
    for problem in error.errors():
        if problem["type"] in told:
            continue
        key = _dotted(problem["loc"], raw)
        reason = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "literal_error" and isinstance(problem["input"], str):
            options = [option.strip("' ") for option in problem["ctx"]["expected"].replace(" or ", ", ").split(", ")]
            reason += _nearest(problem["input"], options)
        shown = f", not {problem['input']!r}" if not isinstance(problem["input"], dict) else ""
        line = f"{path}: {f'{key}: ' if key else ''}{reason}{shown}"
        if line not in seen:
            seen.add(line)
            yield line


def _dotted(location: tuple[int | str, ...], raw: dict[str, Any]) -> str:
    parts = list(location)
    if len(parts) >= 2 and parts[0] == "stages" and isinstance(parts[1], int):
        stage = raw["stages"][parts[1]]
        rest = parts[3:]  # parts[2] is the kind, by which pydantic chose among the stage classes
        own = isinstance(stage, dict) and bool(rest) and _holds(stage, rest)
        if rest and not own and rest[0] in SHARED_SECTIONS and _holds(raw, rest):
            return ".".join(str(part) for part in rest)
        name = stage.get("name", parts[1]) if isinstance(stage, dict) else parts[1]
        parts = ["stages", name, *rest]
    return ".".join(str(part) for part in parts)


def _holds(raw: Any, keys: Sequence[int | str]) -> bool:
    for key in keys:
        if not isinstance(raw, dict) or key not in raw:
            return False
        raw = raw[key]
    return True
