"""Vectors of words for TextReID's text tower: `python -m reid_dist.models.word_gru build VOCABULARY ... --out FILE`.

Each word of a vocabulary file is read alone by a text encoder, and the file holds words and vectors:

    build words.txt --architecture ViT-B-32-quickgelu --weights open_clip:openai --out words.safetensors
    build words.txt --weights runs/pretrain/pretrain/export --out words.safetensors
    build words.txt --hf models/bert-base-uncased --layers mean4 --out words.safetensors

A file that was built from the same words and the same encoder is left as it is.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from reid_dist.data.tokenizer import read_vocabulary
from reid_dist.errors import UserError
from reid_dist.models.dictionary import FORMAT, Dictionary, read_dictionary, read_key, write_dictionary
from reid_dist.models.word_sources import HuggingFaceSource, Layers, RandomSource, TowerSource, WordSource


def build_dictionary(words: Sequence[str], source: WordSource, out: Path) -> bool:
    """Writes the vectors of words, unless the file holds them already.

    Args:
        words: as the tokenizer splits captions.
        source: reads them.
        out: the file.

    Returns:
        Whether anything had to be computed.

    Raises:
        UserError: no words, or vectors that are not finite.
    """
    if not words:
        raise UserError("the vocabulary has no words")
    key = hashlib.sha256(json.dumps([FORMAT, *words, "", *source.content]).encode()).hexdigest()
    if read_key(out) == key:
        read_dictionary(out)  # whole and sound
        return False
    vectors_NW = source.vectors(words)
    if not vectors_NW.isfinite().all():
        raise UserError(f"{source.name}: vectors of words hold nan or inf")
    write_dictionary(out, Dictionary(list(words), vectors_NW, source.name), key)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, 2 for wrong input."""
    options = _parse(arguments)
    try:
        words, source = read_vocabulary(options.vocabulary), _source(options)
        computed = build_dictionary(words, source, options.out)
        rows, width = read_dictionary(options.out).vectors_NW.shape
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {options.out}: cannot be written ({error.strerror}); name another --out", file=sys.stderr)
        return 2
    unknown = source.unknown(words)
    print(f"{options.out}: {rows} words x {width} by {source.name}" + ("" if computed else " (was up to date)"))
    if unknown:
        print(f"{unknown} of the words are unknown to the encoder, which reads them all alike")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m reid_dist.models.word_gru",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build = parser.add_subparsers(required=True).add_parser("build", help="vectors of words by a text encoder")
    build.add_argument("vocabulary", type=Path, help="word list, one a line")
    source = build.add_mutually_exclusive_group(required=True)
    source.add_argument("--weights", help="as model.weights: a file, open_clip:TAG, or an exported stage's folder")
    source.add_argument("--hf", type=Path, metavar="FOLDER", help="Hugging Face text model, such as BERT")
    source.add_argument("--random", type=int, metavar="WIDTH", help="vectors by chance, to compare with")
    build.add_argument("--architecture", help="as model.architecture; an export's is its own")
    build.add_argument("--words", type=Path, help="word list of the encoder's own tokenizer; an export's is its own")
    build.add_argument("--layers", choices=get_args(Layers), default="mean4", help="of --hf: see word_sources.py")
    build.add_argument("--seed", type=int, default=0, help="of --random")
    build.add_argument("--out", type=Path, required=True, help="dictionary to write, a .safetensors file")
    return parser.parse_args(arguments)


def _source(options: argparse.Namespace) -> WordSource:
    if options.hf is not None:
        return HuggingFaceSource(options.hf, options.layers)
    if options.random is not None:
        if options.random < 1:
            raise UserError(f"--random {options.random}: the width of a vector must be at least 1")
        return RandomSource(options.random, options.seed)
    return TowerSource(options.weights, options.architecture, options.words)


if __name__ == "__main__":
    sys.exit(main())
