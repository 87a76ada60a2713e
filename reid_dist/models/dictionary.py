"""Words and their vectors in one safetensors file: what TextReID freezes in its text tower (methods.md 3.3).

Shape suffixes: N words, V rows of the tower's table, W width of a vector.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from reid_dist.errors import UserError
from reid_dist.files import flush

FORMAT = "reid_dist words 1"
SPECIAL_ROWS = 2  # id 0 is padding, id 1 an unknown word; the words follow
REMEDY = "build it with `python -m reid_dist.models.word_gru build VOCABULARY ... --out FILE.safetensors`"
# Of a stage's export, which holds what its tower was built from.
_EXPORT_FILE, _MANIFEST_FILE, _TABLE = "model.safetensors", "manifest.json", "text.words"


@dataclass(frozen=True)
class Dictionary:
    """A vector for each word.

    Attributes:
        words: as the tokenizer splits them, without repetitions.
        vectors_NW: fp32, in the same order.
        source: one line for people: which encoder read the words, and how.
    """

    words: list[str]
    vectors_NW: Tensor
    source: str = ""

    def table(self) -> Tensor:
        """The tower's rows: zeros for padding and for unknown words, then the words. Shape: (V, W)."""
        return torch.cat([self.vectors_NW.new_zeros(SPECIAL_ROWS, self.vectors_NW.shape[1]), self.vectors_NW])

    def digest(self) -> str:
        """Hash of words and vectors, as hexadecimal digits: the same wherever and by whom the file was written."""
        found = hashlib.sha256("\n".join(self.words).encode())
        found.update(self.vectors_NW.contiguous().numpy().tobytes())
        return found.hexdigest()


def write_dictionary(path: Path, dictionary: Dictionary, key: str) -> None:
    """Writes the file, whole or not at all.

    Args:
        path: its folder is made.
        dictionary: what to write.
        key: hash of all that decides the content, for `read_key`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    told = {"format": FORMAT, "words": "\n".join(dictionary.words), "source": dictionary.source, "key": key}
    try:
        save_file({"vectors": dictionary.vectors_NW.contiguous()}, partial, metadata=told)
        flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_key(path: Path) -> str | None:
    """The key that a dictionary was written with; None where there is no such file."""
    try:
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
    except (OSError, SafetensorError):
        return None
    return told.get("key") if told.get("format") == FORMAT else None


def read_dictionary(path: Path) -> Dictionary:
    """Reads a dictionary, or the words of an exported stage whose text tower was built from one.

    Raises:
        UserError: no such file, something else than a dictionary, or words and vectors that do not belong together.
    """
    dictionary = _read_export(path) if path.is_dir() else _read_file(path)
    _check(dictionary, path)
    return dictionary


def _read_file(path: Path) -> Dictionary:
    try:
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
            vectors = file.get_tensor("vectors") if told.get("format") == FORMAT else None
    except (OSError, SafetensorError) as error:
        raise UserError(f"word_gru.dictionary: {path} cannot be read ({_first_line(error)}); {REMEDY}") from None
    if vectors is None:
        raise UserError(f"word_gru.dictionary: {path} holds tensors, but is no dictionary of words; {REMEDY}")
    return Dictionary(told["words"].split("\n"), vectors, told.get("source", ""))


def _read_export(folder: Path) -> Dictionary:
    try:
        words: Sequence[str] = json.loads((folder / _MANIFEST_FILE).read_text())["words"]
        with safe_open(folder / _EXPORT_FILE, "pt") as file:
            table_VW = file.get_tensor(_TABLE)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"word_gru.dictionary: {folder} is no exported stage with a dictionary ({_first_line(error)}); name a"
            " .safetensors file"
        ) from None
    return Dictionary(list(words or ()), table_VW[SPECIAL_ROWS:], f"the export {folder}")


def _check(dictionary: Dictionary, path: Path) -> None:
    words, vectors_NW = dictionary.words, dictionary.vectors_NW
    if vectors_NW.dim() != 2 or vectors_NW.dtype != torch.float32 or len(words) != len(vectors_NW) or not words:
        shape = f"{str(vectors_NW.dtype).removeprefix('torch.')} {tuple(vectors_NW.shape)}"
        raise UserError(f"word_gru.dictionary: {path}: {len(words)} words, but vectors of {shape}; {REMEDY}")
    if len(set(words)) < len(words):
        raise UserError(f"word_gru.dictionary: {path}: a word stands twice; {REMEDY}")
    if not vectors_NW.isfinite().all():
        raise UserError(f"word_gru.dictionary: {path}: vectors hold nan or inf; {REMEDY}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
