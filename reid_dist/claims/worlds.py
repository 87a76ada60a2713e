"""The data of a seed: shard sets of three procedural worlds, a word list, and what can be reached at most.

Images (I2I) and captioned images (T2I) are of two worlds: other people, who cannot leak, and other cameras, as with
real sets. The generic pairs show scenes and people of a fourth world. A third set of captioned images, only tested on,
has cameras that no training saw.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reid_dist.claims.arms import CAPTIONED, GENERIC, IMAGES, UNSEEN
from reid_dist.data.reader import ShardSet
from reid_dist.data.tokenizer import count_words, write_vocabulary
from reid_dist.errors import UserError
from reid_dist.evaluation.baselines import closed_form_baselines
from reid_dist.evaluation.benchmark import load_baseline_data
from reid_dist.files import write_json
from shards.world.export import export
from shards.world.oracle import ceilings
from shards.world.spec import LEVELS, ExportSpec, World
from shards.write import write

WORLD_FILE = "world.json"
VOCABULARY_FILE = "vocabulary.txt"
# Of all worlds here, stated in the report: some of what captions tell holds for one picture only. That is what the two
# tasks are said to disagree on (methods.md 5).
INSTANCE = 0.5
_WORLDS = 3  # seeds that a seed of ours uses up


@dataclass(frozen=True)
class Sizes:
    """How much there is.

    Attributes:
        captioned: identities with captions, to train on.
        images: identities without, to train on.
        test: identities of each test set.
        pairs: generic pairs.
        person_share: share of these that show people; with .4 every word of the people's captions occurs.
    """

    captioned: int
    images: int
    test: int
    pairs: int
    person_share: float = 0.6

    @classmethod
    def of(cls, captioned: int) -> "Sizes":
        """All sizes in proportion to the number of captioned identities."""
        return cls(captioned, captioned, max(2, captioned // 2), captioned * 30)


def parameters(level: str, sizes: Sizes, seed: int) -> dict[str, Any]:
    """Everything that decides the data of a seed."""
    return {"level": level, **LEVELS[level], "instance": INSTANCE, "sizes": asdict(sizes), "seed": seed}


def build_world(folder: Path, level: str, sizes: Sizes, seed: int, image_size: tuple[int, int]) -> None:
    """Draws and writes what is not there yet.

    Args:
        folder: becomes the `data.root` of the seed's runs; `world.json` in it comes last.
        level: a name in `shards.world.spec.LEVELS`.
        sizes: how much.
        seed: of everything.
        image_size: height and width at which the closed-form learners see the images.

    Raises:
        UserError: the folder holds data of other parameters.
    """
    wanted = parameters(level, sizes, seed)
    if _is_built(folder, wanted):
        return
    raw = folder / "raw"
    for name, spec in _exports(level, sizes, seed).items():
        export(spec, raw / name)
        write(spec.format, raw / name, folder / name, dataset=name, workers=1)
    sets = [ShardSet(folder / CAPTIONED), ShardSet(folder / GENERIC)]
    write_vocabulary(count_words(sets), folder / VOCABULARY_FILE)
    limits = closed_form_baselines(load_baseline_data(ShardSet(folder / IMAGES), sets[0], image_size))
    limits["oracle"] = dict(ceilings(raw / CAPTIONED, raw / IMAGES))
    shutil.rmtree(raw)
    write_json(folder / WORLD_FILE, {"parameters": wanted, "limits": limits})


def read_limits(folder: Path) -> dict[str, Any]:
    """Chance, closed-form learners and the perfect reader, by name and task."""
    limits: dict[str, Any] = json.loads((folder / WORLD_FILE).read_text())["limits"]
    return limits


def _is_built(folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether the data are there already.

    Raises:
        UserError: others are.
    """
    path = folder / WORLD_FILE
    if not path.exists():
        return False
    try:
        found = json.loads(path.read_text())["parameters"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: cannot be read; remove {folder}") from None
    if found != wanted:
        names = ", ".join(name for name in wanted if found.get(name) != wanted[name])
        raise UserError(f"{folder}: holds another world (differs: {names}); remove it, or choose another --runs")
    return True


def _exports(level: str, sizes: Sizes, seed: int) -> dict[str, ExportSpec]:
    captioned, images, unseen = (
        World(seed=_WORLDS * seed + number, instance=INSTANCE, **LEVELS[level]) for number in range(_WORLDS)
    )
    eight = 8  # pictures of a person
    return {
        CAPTIONED: ExportSpec("cuhk_pedes", captioned, sizes.captioned, sizes.test, 0, eight, 0.0),
        IMAGES: ExportSpec("market1501", images, sizes.images, sizes.test, 0, eight, 0.0),
        GENERIC: ExportSpec("img2dataset", captioned, sizes.pairs, 0, 0, eight, sizes.person_share),
        UNSEEN: ExportSpec("cuhk_pedes", unseen, 1, sizes.test, 0, eight, 0.0),
    }
