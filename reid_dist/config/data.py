"""Settings of the training data of a stage."""

from typing import Literal
from urllib.parse import urlsplit, urlunsplit

from pydantic import Field, model_validator

from reid_dist.config.section import Byte, Positive, Section


class AugmentConfig(Section):
    """Augmentation of training images, per image on uint8."""

    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    pad: int = Field(0, ge=0, description="pixels of padding before a random crop back to size")
    erase: float = Field(0.0, ge=0, le=1, description="probability of erasing a random rectangle")
    erase_fill: tuple[Byte, Byte, Byte] | None = Field(None, description="its colour, 0 to 255; none: noise")
    jitter: float = Field(0.0, ge=0, lt=1, description="largest relative change of each channel's gain")
    color: float = Field(0.0, ge=0, lt=1, description="largest relative change of brightness, contrast and saturation")
    crop: float = Field(1.0, gt=0, le=1, description="least share of the area of a random resized crop; 1: none")
    rand_ops: int = Field(0, ge=0, le=8, description="RandAugment: operations per image")
    rand_magnitude: float = Field(0.3, ge=0, le=1, description="RandAugment: strength of each operation")


class StreamConfig(Section):
    """How `reader: stream` goes through its tars."""

    resampled: bool = Field(False, description="tars drawn with replacement; false: pass after pass over all of them")
    shuffle_buffer: int = Field(1000, gt=0, description="samples that each worker holds and mixes")


class DataConfig(Section):
    """Training data of a stage and how it is batched."""

    root: str = Field("data/shards", description="folder, or https, http or s3 address, of shard sets")
    train: list[str] = Field(
        default_factory=list,
        description="shard sets below root, or with a path or address of their own, whose training split is used; "
        "with reader=stream also tars by pattern, cc3m/{00000..00331}.tar",
    )
    weights: list[Positive] = Field(
        default_factory=list, description="share of each set of `train` in every batch; none: by their sizes"
    )
    reader: Literal["index", "stream"] = Field(
        "index", description="index: any sample at any time, exact epochs; stream: tars from beginning to end"
    )
    stream: StreamConfig = StreamConfig()
    global_batch_size: int = Field(64, gt=0, description="samples per optimizer step over all ranks and accumulation")
    mixing: Literal["mixed", "alternating", "sequential"] = Field(
        "mixed", description="sets of `train` by `weights`: in every batch, batch after batch, or one set at a time"
    )
    items: Literal["images", "captions"] = Field(
        "images", description="what an epoch counts: images, each with one of its captions, or all pairs of them"
    )
    sampler: Literal["epoch", "identity"] = Field("epoch", description="shuffled samples, or P identities x K images")
    images_per_identity: int = Field(
        4, gt=0, description="K of sampler=identity; P = global_batch_size / accumulation / K"
    )
    identities: int | None = Field(None, gt=0, description="training identities, for --dry-run without the data")
    exclude: str | None = Field(None, description="file below root: identities and images never trained on, one a line")
    allow_overlap: bool = Field(
        False, description="train although images of the evaluation sets are among the training's"
    )
    max_bad_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of unreadable samples that are counted and replaced; 0: stop at the first"
    )
    workers: int = Field(0, ge=0, description="loading processes per rank; 0: in the training process")
    cache: bool = Field(
        False,
        description="reader=index: keep decoded, resized images in memory (bytes: samples x 3 x height x width)",
    )
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "DataConfig":
        if self.weights and len(self.weights) != len(self.train):
            raise ValueError(f"weights: {len(self.weights)} numbers for {len(self.train)} sets; give one for each")
        if self.reader == "stream" and self.sampler == "identity":
            raise ValueError("sampler: identity needs reader=index; a stream knows no identities")
        if self.reader == "stream" and (self.mixing != "mixed" or self.items != "images"):
            raise ValueError("mixing and items need reader=index; a stream gives pairs as they come: remove the keys")
        if self.mixing != "mixed" and len(self.train) < 2:
            raise ValueError(f"mixing: {self.mixing} needs two sets in `train`; add one, or remove the key")
        return self

    def location(self, name: str) -> str:
        """Where a set is: its own path or address, or the one below `root`."""
        if name.startswith("/") or "://" in name:
            return name
        if "://" not in self.root:
            return f"{self.root.rstrip('/')}/{name}"
        root = urlsplit(self.root)  # what follows the path, the token of a signed address, stays behind it
        return urlunsplit(root._replace(path=f"{root.path.rstrip('/')}/{name}"))
