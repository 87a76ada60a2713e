"""Heat maps of a trained model: `python -m reid_dist.heat_maps RUN --image FILE [--text TEXT | --like FILE] --out PNG`.

With a sentence: where in the image the model finds it and each of its words. Without: what it attends to, and where
the image is like itself as a whole, or like another one.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from reid_dist.data.transforms import decode_image
from reid_dist.errors import UserError
from reid_dist.files import write_bytes
from reid_dist.report.figures import require_plot
from reid_dist.report.heat_plots import draw_strips, query_strips, word_strip
from reid_dist.report.token_maps import require_maps
from reid_dist.trained import TrainedModel, load


def heat_maps(model: TrainedModel, image: Path, text: str | None = None, like: Path | None = None) -> bytes:
    """A PNG of the maps of one image.

    Args:
        model: of `reid_dist.load`, with image tokens: a ViT or row tower.
        image: a file.
        text: a sentence about a person.
        like: instead of a sentence, an image whose likeness is sought.

    Raises:
        UserError: an image cannot be read, the sentence is empty, or the model has no such maps.
    """
    require_plot()
    require_maps(model.encoder, model.tokenizer if text is not None else None, str(model.folder))
    shown = _picture(model, image)
    if text is not None:
        if not text.strip():
            raise UserError("--text: the sentence is empty; describe a person")
        words = word_strip(model.encoder, model.tokenizer, shown, text)
        return draw_strips(f"{image.name}: where the model finds words", [(text[:110], words)])
    if like is None:
        strips = query_strips(model.encoder, shown)
    else:
        strips = query_strips(model.encoder, _picture(model, like), shown, "image")
    return draw_strips(f"{image.name}: where the model looks", [("", strip) for strip in strips])


def _picture(model: TrainedModel, path: Path) -> Image.Image:
    """What the model sees of a file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name an image") from None
    return Image.fromarray(decode_image(data, model.image_size, str(path)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 2 for wrong input, 1 for a full disk and the like."""
    parser = argparse.ArgumentParser(prog="python -m reid_dist.heat_maps", description=(__doc__ or "").splitlines()[2])
    parser.add_argument("run", type=Path, help="folder of a run, of one of its stages, or an export")
    parser.add_argument("--image", type=Path, required=True, metavar="FILE")
    wanted = parser.add_mutually_exclusive_group()
    wanted.add_argument("--text", help="a sentence: one map for it, and one for each word")
    wanted.add_argument("--like", type=Path, metavar="FILE", help="another image: where this one is like it")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="picture to write")
    options = parser.parse_args(arguments)
    try:
        if options.out.suffix.lower() != ".png":
            raise UserError(f"--out {options.out}: name a file that ends in .png")
        require_plot()
        write_bytes(options.out, heat_maps(load(options.run), options.image, options.text, options.like))
    except UserError as error:
        print(f"heat_maps: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"heat_maps: {options.out}: {error.strerror or error}", file=sys.stderr)
        return 1
    print(f"written: {os.fspath(options.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
