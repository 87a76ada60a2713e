"""Annotations of foreign data sets: JSON is checked entry by entry, text is read in lines of bounded length."""

import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ValidationError

from reid_dist.errors import UserError

_Entry = TypeVar("_Entry", bound=BaseModel)
_SHOWN = 200


def encodable(text: str) -> str:
    """The text itself, when it can be written as UTF-8.

    Raises:
        UnicodeEncodeError: it holds half of a surrogate pair, which JSON can escape but no file can store.
    """
    text.encode()
    return text


Text = Annotated[str, AfterValidator(encodable)]


def files_below(folder: Path, suffix: str) -> list[Path]:
    """The files of any depth whose names end in `suffix`, by path; hidden ones and hidden folders are left out."""
    found = (path for path in folder.rglob(f"*{suffix}") if path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def read_json(path: Path, remedy: str) -> Any:
    """The content of a JSON file, hundreds of megabytes at most.

    Args:
        path: the file.
        remedy: what to do when it is not there or damaged.

    Raises:
        UserError: there is no such file, it is not JSON, or it names a key of an object twice.
    """
    if not path.is_file():
        raise UserError(f"{path}: missing; {remedy}")
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=unique_keys)
    except RecursionError:
        raise UserError(f"{path}: not JSON of a data set (nested too deeply); {remedy}") from None
    except ValueError as error:  # malformed, not UTF-8, or a key twice
        raise UserError(f"{path}: not JSON ({str(error)[:_SHOWN]}); {remedy}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore the file") from None


def validated(model: type[_Entry], entry: object, origin: str, remedy: str) -> _Entry:
    """One entry as its model.

    Args:
        model: a strict model.
        entry: what JSON gave.
        origin: place of the entry, for the message.
        remedy: what to do when it is of another form.

    Raises:
        UserError: it is of another form; names the first field that is wrong.
    """
    try:
        return model.model_validate(entry)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{origin}: {place or 'all of it'}: {first['msg']}; {remedy}") from None


def entries(path: Path, model: type[_Entry], remedy: str) -> Iterator[tuple[str, _Entry]]:
    """The elements of a file that is one JSON list, each with its place for later messages.

    Raises:
        UserError: see `read_json` and `validated`; also when the file is no list.
    """
    content = read_json(path, remedy)
    if not isinstance(content, list):
        raise UserError(f"{path}: not a JSON list; {remedy}")
    for number in range(len(content)):
        # Let go of what was read: a list of millions fills gigabytes.
        entry, content[number] = content[number], None
        origin = f"{path}: entry {number}"
        yield origin, validated(model, entry, origin, remedy)


def sentences(captions: Iterable[str]) -> tuple[str, ...]:
    """The captions without white space around them; those of nothing else are left out."""
    return tuple(text for caption in captions if (text := caption.strip()))


def bounded_lines(file: IO[str], name: str, cap: int) -> Iterator[str]:
    """The lines of a text file, each at most `cap` characters: one line cannot fill the memory.

    Args:
        file: opened with newline="" where line ends inside quotes matter.
        name: what the error message calls it.
        cap: most characters of a line.

    Raises:
        UserError: a longer line, text that is not UTF-8, or a compressed file that is damaged.
    """
    number = 0
    while True:
        number += 1
        try:
            line = file.readline(cap + 1)
        except UnicodeDecodeError:
            raise UserError(f"{name}: line {number} or one soon after: not UTF-8; save the file as UTF-8") from None
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{name}: after line {number - 1}: damaged ({error}); get the file again") from None
        if len(line) > cap:
            raise UserError(f"{name}: line {number}: more than {cap} characters; shorten it or remove the line")
        if not line:
            return
        yield line


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys must differ: json would keep the last of two without a word.

    Raises:
        ValueError: a key occurs twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = sorted(key for key, _ in pairs)
        twice = next(one for one, two in itertools.pairwise(names) if one == two)
        raise ValueError(f"the key {twice[:_SHOWN]!r} occurs twice")
    return found
