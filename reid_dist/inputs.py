"""What a run reads: encoder, tokenizer, shard sets and exclusions, checked before any device is touched."""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from reid_dist.checkpoint.portable import file_sha256, fingerprint
from reid_dist.config import (
    I2IStageConfig,
    ModelConfig,
    PretrainLoss,
    PretrainStageConfig,
    PromptStageConfig,
    RunConfig,
    StageConfig,
    T2IStageConfig,
    TextLoss,
)
from reid_dist.data.cache import ImageCache
from reid_dist.data.contamination import find_contamination
from reid_dist.data.exclude import NOTHING, Exclusions, read_exclusions
from reid_dist.data.loader import Sampling, TrainLoader
from reid_dist.data.reader import ShardSet
from reid_dist.data.sampler import local_batch_size
from reid_dist.data.stream.loader import StreamLoader, StreamSampling
from reid_dist.data.stream.position import resume_position
from reid_dist.data.stream.samples import StreamSamples
from reid_dist.data.stream.source import StreamSource
from reid_dist.data.tokenizer import Tokenizer, WordTokenizer, build_tokenizer, read_vocabulary
from reid_dist.data.training_samples import TrainingSamples
from reid_dist.data.transforms import Augment
from reid_dist.errors import UserError
from reid_dist.evaluation.benchmark import require_rows
from reid_dist.metrics import say
from reid_dist.models.architecture import build_dual_encoder, read_architecture
from reid_dist.models.dictionary import read_dictionary
from reid_dist.models.dual_encoder import DualEncoder, TextShape
from reid_dist.models.first_weights import TIMM
from reid_dist.models.weights import EXPORT_FILE, OPEN_CLIP_TAG


@dataclass
class Inputs:
    """Everything that a run reads, opened and checked before a device or a process group is touched."""

    shards: dict[str, ShardSet]  # by location: what is read by index, training and benchmarks
    streams: dict[str, list[StreamSource]]  # by stage: what is streamed
    tokenizer: Tokenizer
    exclusions: dict[str, Exclusions]
    cache: ImageCache = field(default_factory=ImageCache)

    @property
    def words(self) -> list[str]:
        """The word list of the tokenizer; empty for an architecture's own tokenizer."""
        return self.tokenizer.words if isinstance(self.tokenizer, WordTokenizer) else []

    def excluded(self, stage: StageConfig) -> Exclusions:
        """What a stage must not train on."""
        return self.exclusions[stage.data.location(stage.data.exclude)] if stage.data.exclude else NOTHING


def open_inputs(config: RunConfig, world_size: int) -> Inputs:
    """Opens every shard set and the tokenizer, and checks that the batches can be shared by the ranks.

    Raises:
        UserError: the first thing that is missing or does not fit.
    """
    for stage in config.stages:
        check_batch(stage, world_size)
    if config.model.sync_batch_norm and not torch.cuda.is_available():
        raise UserError("model.sync_batch_norm: torch's SyncBatchNorm runs on GPUs only; remove the key")
    locations = {location for stage in config.stages for location in stage_locations(stage)}
    lists = {stage.data.location(stage.data.exclude) for stage in config.stages if stage.data.exclude}
    shards = {location: ShardSet(location) for location in sorted(locations)}
    exclusions = {path: read_exclusions(path) for path in sorted(lists)}
    model = config.model
    shape = build_encoder(model, seed=None).text_shape
    tokenizer = _tokenizer(model, shape)
    inputs = Inputs(shards, {}, tokenizer, exclusions)
    for stage in config.stages:
        if stage.data.reader == "stream":
            excluded = inputs.excluded(stage)
            inputs.streams[stage.name] = [StreamSource(each, excluded) for each in training_locations(stage)]
    local_weights(config.model)
    local_visual_weights(config.model)
    for index, stage in enumerate(config.stages):
        if config.stage_steps(stage):
            train_loader(config, index, inputs, 0, world_size)
        for name in (*stage.evaluation.t2i, *stage.evaluation.i2i):
            require_rows(inputs.shards[stage.data.location(name)], stage.evaluation.split)
    _refuse_overlap(config, inputs)
    return inputs


def _tokenizer(model: ModelConfig, shape: TextShape) -> Tokenizer:
    """The architecture's, or a word list's; words alone for a tower of words and a GRU, where a dictionary has them."""
    if model.word_gru is None:
        return build_tokenizer(model.vocabulary, model.architecture, shape.context_length, shape.vocab_size)
    if model.word_gru.dictionary is not None:
        words = read_dictionary(model.word_gru.dictionary).words
    else:
        assert model.vocabulary is not None  # the configuration wants one of them
        words = read_vocabulary(model.vocabulary)
    return WordTokenizer(words, shape.context_length, shape.vocab_size, framed=False)


def _refuse_overlap(config: RunConfig, inputs: Inputs) -> None:
    """Refuses to train on what any stage of the run is scored on; tars without an index cannot be compared."""
    scored = [
        stage.data.location(name) for stage in config.stages for name in (*stage.evaluation.t2i, *stage.evaluation.i2i)
    ]
    tested = [inputs.shards[location] for location in dict.fromkeys(scored)]
    for stage in config.stages:
        if stage.data.allow_overlap or not config.stage_steps(stage):
            continue
        if stage.data.reader == "stream":
            trained = [source.shards for source in inputs.streams[stage.name] if source.shards is not None]
        else:
            trained = [inputs.shards[location] for location in training_locations(stage)]
        problems = find_contamination(trained, tested, inputs.excluded(stage))
        if problems:
            raise UserError(
                f"stages.{stage.name}: {'; '.join(problems)}; data.allow_overlap=true trains on them all the same"
            )


def local_weights(model: ModelConfig) -> Path | None:
    """The file of the first weights; None for random ones or an open_clip tag.

    Raises:
        UserError: there is no such file.
    """
    if model.weights is None or model.weights.startswith(OPEN_CLIP_TAG):
        return None
    return _existing("model.weights", model.weights)


def local_visual_weights(model: ModelConfig) -> Path | None:
    """The file of the image tower's first weights; None for those of `local_weights`, or timm's.

    Raises:
        UserError: there is no such file.
    """
    if model.visual_weights is None or model.visual_weights.startswith(TIMM):
        return None
    return _existing("model.visual_weights", model.visual_weights)


def _existing(key: str, weights: str) -> Path:
    path = Path(weights)
    path = path / EXPORT_FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{key}: {path} does not exist")
    return path


def training_locations(stage: StageConfig) -> list[str]:
    """Where a stage's training sets are."""
    return [stage.data.location(name) for name in stage.data.train]


def stage_locations(stage: StageConfig) -> list[str]:
    """Every set that a stage reads by index: to train on or to be scored on."""
    scored = [stage.data.location(name) for name in (*stage.evaluation.t2i, *stage.evaluation.i2i)]
    return scored if stage.data.reader == "stream" else training_locations(stage) + scored


def check_batch(stage: StageConfig, world_size: int) -> int:
    """Samples per rank and accumulation step.

    Raises:
        UserError: the world size or the accumulation does not divide the global batch.
    """
    images = stage.data.images_per_identity if stage.data.sampler == "identity" else 1
    try:
        return local_batch_size(
            stage.data.global_batch_size, world_size, stage.engine.gradient_accumulation_steps, images
        )
    except UserError as error:
        raise UserError(f"stages.{stage.name}: {error}") from error


def build_encoder(model: ModelConfig, seed: int | None) -> DualEncoder:
    """The encoder with random weights by seed, or (None) only its shape, on no device."""
    if seed is not None:
        torch.manual_seed(seed)
    with torch.device("meta") if seed is None else contextlib.nullcontext():
        encoder = build_dual_encoder(model)
    encoder.set_grad_checkpointing(model.gradient_checkpointing)
    return encoder


def stage_fingerprints(config: RunConfig, inputs: Inputs) -> list[str]:
    """What decides the weights of each stage, all stages before it and the content of its data included."""
    model = [json.dumps(read_architecture(config.model.architecture), sort_keys=True), *inputs.words]
    weights = local_weights(config.model)
    if weights is not None:
        model.append(file_sha256(weights))
    visual_weights = local_visual_weights(config.model)
    if visual_weights is not None:
        model += ["visual", file_sha256(visual_weights)]
    if config.model.word_gru is not None and config.model.word_gru.dictionary is not None:
        model += ["dictionary", read_dictionary(config.model.word_gru.dictionary).digest()]
    found: list[str] = []
    for stage in config.stages:
        if stage.data.reader == "stream":
            sets = [json.dumps(source.identity()) for source in inputs.streams[stage.name]]
        else:
            sets = [inputs.shards[location].manifest.model_dump_json() for location in training_locations(stage)]
        excluded = inputs.excluded(stage)
        parts = ("model", *model, "sets", *sets, "excluded", *sorted(excluded.pids), *sorted(excluded.images))
        data = [hashlib.sha256(part.encode()).hexdigest() for part in parts]
        found.append(fingerprint(config, stage, found[-1] if found else "", data))
    return found


def train_loader(
    config: RunConfig,
    index: int,
    inputs: Inputs,
    rank: int,
    world_size: int,
    pin_memory: bool = False,
    positions: Sequence[dict[str, Any]] = (),
) -> TrainLoader | StreamLoader:
    """A rank's training batches of a stage; with the positions of all ranks of a checkpoint those that follow it.

    Raises:
        UserError: samples without the captions that the stage needs, too few identities or tars, or a batch that does
            not fit.
    """
    stage = config.stages[index]
    data, text = stage.data, caption_losses(stage)
    tokenizer = None if text is None else inputs.tokenizer
    size, augment = config.model.image_size, Augment(**data.augment.model_dump())
    accumulation, seed = stage.engine.gradient_accumulation_steps, stage_seed(config, index)
    reading = (rank, world_size, data.workers, pin_memory and data.workers > 0, data.max_bad_fraction)
    if data.reader == "stream":
        streamed = StreamSampling(
            data.global_batch_size,
            accumulation,
            seed,
            data.stream.shuffle_buffer,
            data.stream.resampled,
            tuple(data.weights),
        )
        position = None
        if positions:
            position, repeated = resume_position(positions, rank, world_size, data.workers)
            if repeated:
                say(f"{stage.name}: with other ranks or workers {repeated} samples of tars that were begun come again")
        samples = StreamSamples(inputs.streams[stage.name], size, tokenizer, augment)
        return StreamLoader(samples, streamed, *reading, position)
    masked = text if isinstance(text, TextLoss) and text.mlm_weight > 0 else None
    items = TrainingSamples(
        [inputs.shards[location] for location in training_locations(stage)],
        size,
        tokenizer,
        augment,
        inputs.cache if data.cache else None,
        allow_uncaptioned=isinstance(stage, I2IStageConfig),
        exclude=inputs.excluded(stage),
        mask_probability=0.0 if masked is None else masked.mask_probability,
        mask_form="words" if masked is None else masked.mask,
        items=data.items,
    )
    sampling = Sampling(
        data.global_batch_size,
        data.sampler,
        data.images_per_identity,
        accumulation,
        seed,
        tuple(data.weights),
        data.mixing,
        config.stage_steps(stage),
    )
    return TrainLoader(items, sampling, *reading, positions)


def caption_losses(stage: StageConfig) -> TextLoss | PretrainLoss | None:
    """The losses of a stage that see captions; None for a stage that reads images alone."""
    if isinstance(stage, I2IStageConfig):
        return stage.loss.text if stage.loss.text_weight > 0 else None
    if isinstance(stage, PretrainStageConfig | PromptStageConfig | T2IStageConfig):
        return stage.loss
    return None  # identity prompts: sentences of its own


def stage_seed(config: RunConfig, index: int) -> int:
    """Seed of a stage's order, augmentation and new heads."""
    return config.seed * 1000 + index + 1
