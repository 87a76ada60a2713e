"""The model card: what a model is, what made it, how well it does, what it is for and what not."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from reid_dist.config import RunConfig, StageConfig
from reid_dist.export.folder import listed_files
from reid_dist.export.provenance import METRICS, Provenance, TrainingSet
from reid_dist.files import content_sha256
from reid_dist.trained import TrainedModel

CARD_FILE = "README.md"
# Of the settings: where things lay on the machine that trained.
_PLACES: Any = {"output_dir": True, "model": {"weights", "visual_weights", "vocabulary", "word_gru", "architecture"}}
_STAGE_PLACES: Any = {"data": {"root", "train", "exclude"}, "evaluation": {"t2i", "i2i"}}
_LONGEST = 300

_LOADING = {
    "safetensors": """\
```python
from reid_dist import load

model = load("FOLDER")
model.encode_text("a woman in a red coat") @ model.encode_image(["a.jpg", "b.jpg"]).T
```""",
    "open_clip": """\
```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
model.eval()
```

`reid_dist.load("FOLDER")` reads the same folder.""",
    "onnx": """\
```python
import onnxruntime

images = onnxruntime.InferenceSession("FOLDER/image.onnx")
sentences = onnxruntime.InferenceSession("FOLDER/text.onnx")
images.run(None, {"image": pixels})[0] @ sentences.run(None, {"text": tokens})[0].T
```

Pixels and tokens are described in `export.json`. Features have length 1, so their product is the cosine.""",
    "torch": """\
```python
import torch

weights = torch.load("FOLDER/model.pt", weights_only=True)
```

Names are those of open_clip's `CustomTextCLIP` where the towers are open_clip's.""",
}

_BEGIN, _END = "## Training data", "## Intended use"  # of what another export may take over
_USES = f"""\
{_END}

Research on person re-identification and image-text retrieval, on images whose subjects agreed to it or that show no
real person, by people who may use the training data listed above: finding the images of one person, by an image or by
a description, in a collection that one is allowed to hold.

## Out of scope

- Covert tracking of people, mass surveillance, and any search for a person who did not agree to it.
- Decisions about people: a high score is likeness of clothes and build, no proof of identity. Two people dressed alike
  score high, one person after a change of clothes scores low.
- Inferring ethnicity, religion, health, age or other protected attributes.
- Other kinds of images or languages than those of the training data, without measuring first.

Features of images of people are personal data where the images are. Errors can fall unevenly on groups of people whom
the training data show rarely; nothing on this page measures that.

## What is left out

The queue of past features, identity classifiers and what else is about single people of the training data is not in
these files. What the towers learned from the images may still be recovered from them in part.
"""


def model_card(model: TrainedModel, provenance: Provenance, form: str, earlier: str = "") -> str:
    """The card in Markdown. What comes from data and settings is escaped.

    Args:
        model: what was exported.
        provenance: of it.
        form: of the export, see `_LOADING`.
        earlier: see `earlier_card`; it counts where the run is out of reach.
    """
    known = (
        f"{_BEGIN}\n\n{_training_data(provenance)}",
        f"## Recipe\n\n{_recipe(provenance)}",
        f"## Metrics\n\n{_metrics(provenance)}",
    )
    parts = (
        "# Encoder of images of people and of sentences about them",
        _facts(model, provenance),
        f"## Loading\n\n{_LOADING[form]}",
        *(known if provenance.config is not None or not earlier else (earlier,)),
        _USES,
    )
    return "\n\n".join(parts)


def earlier_card(folder: Path) -> str:
    """Training data, recipe and metrics from the card of an export of ours, as it was written; empty: there is none."""
    path = folder / CARD_FILE
    digest = listed_files(folder).get(CARD_FILE)
    if digest is None or not path.is_file() or content_sha256(path) != digest:
        return ""
    _, begin, rest = path.read_text(encoding="utf-8").partition(_BEGIN)
    return f"{begin}{rest.partition(_END)[0]}".rstrip()


def escape(text: object) -> str:
    """Text for a cell of Markdown: one line of bounded length without markup."""
    line = " ".join(str(text).split())
    line = line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#!~])", r"\\\1", line)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of Markdown; cells are escaped."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(escape, row)) + " |" for row in rows)])


def _facts(model: TrainedModel, provenance: Provenance) -> str:
    manifest, (height, width) = model.manifest, model.image_size
    parameters = sum(parameter.numel() for parameter in model.encoder.parameters())
    architecture = str(manifest["model"]["architecture"]).rpartition("/")[2]
    run = "" if provenance.config is None else f"run {provenance.name}, "
    tokenizer = f"{len(manifest['words'])} words" if manifest["words"] else "open_clip's"
    rows = [
        ("architecture", f"{architecture}, {parameters:,} parameters"),
        ("images", f"RGB, resized to {height} x {width} (height x width) with bicubic interpolation"),
        ("sentences", f"{model.encoder.text_shape.context_length} tokens, tokenizer: {tokenizer}"),
        ("features", model.features),
        ("trained by", f"{run}stage {manifest.get('stage', '?')}, {manifest.get('steps', '?')} steps"),
        ("versions", ", ".join(f"{name} {number}" for name, number in manifest.get("versions", {}).items())),
        ("sha256 of the weights", model.digest),
    ]
    return table(("", ""), rows)


def _training_data(provenance: Provenance) -> str:
    if provenance.config is None:
        return "Not known: the weights were exported from a folder without the settings of their run."
    told = [table(("stage", "set", "training split", "licence", "consent", "source"), map(_set_row, provenance.sets))]
    citations = sorted({each.told("citation") for each in provenance.sets} - {""})
    told += ["\n".join(f"- {escape(citation)}" for citation in citations)] if citations else []
    told += [f"Before the first stage: {escape(_first_weights(provenance))}."]
    told += [
        "Counts and terms are those of the shard sets as they lay there when this was written. The program is under"
        " Apache-2.0; whether these weights may be used, published or sold follows from the terms of the data, the"
        " strictest of them."
    ]
    return "\n\n".join(told)


def _set_row(each: TrainingSet) -> tuple[str, ...]:
    if each.manifest is None:
        return (each.stage, each.name, "", "not known: no card was found", "", "")
    counts = each.manifest.splits.get("train")
    used = "" if counts is None else f"{counts.images:,} images, {counts.identities:,} identities"
    title = each.told("title")
    name = f"{each.name} ({title})" if title and title != each.name else each.name
    licence, consent = (each.told(key) or "not stated" for key in ("licence", "consent"))
    return (each.stage, name, used, licence, consent, each.told("source"))


def _first_weights(provenance: Provenance) -> str:
    if not provenance.weights:
        return "random weights"
    return f"the weights {' and '.join(provenance.weights)}, whose training data have terms of their own"


def _recipe(provenance: Provenance) -> str:
    config = provenance.config
    if config is None:
        return "Not known."
    rows = [_stage_row(config, stage) for stage in provenance.stages]
    settings = config.model_dump(mode="json", exclude={**_PLACES, "stages": {"__all__": _STAGE_PLACES}})
    settings["stages"] = [each for each in settings["stages"] if each["name"] in {s.name for s in provenance.stages}]
    full = yaml.safe_dump(settings, sort_keys=False).replace("```", "")
    head = ("stage", "kind", "steps", "batch", "optimizer", "rate", "precision")
    return f"{table(head, rows)}\n\nAll settings, without the places of files:\n\n```yaml\n{full}```"


def _stage_row(config: RunConfig, stage: StageConfig) -> tuple[object, ...]:
    batch, optimizer = stage.data.global_batch_size, stage.optimizer
    return (
        stage.name, stage.kind, config.stage_steps(stage), batch, optimizer.name, optimizer.lr, stage.engine.precision
    )  # fmt: skip


def _metrics(provenance: Provenance) -> str:
    rows = [(*score[:4], *(f"{value:.1f}" for value in score.values)) for score in provenance.scores]
    if not rows:
        return "Not known: no scores of this stage were found."
    note = (
        "Percent. t2i: a sentence finds images; i2t: an image finds sentences; i2i: an image finds images of other"
        " cameras. Measured by this program: by the run when the stage ended, or later by launch/evaluate.py."
    )
    return f"{table(('task', 'set', 'split', 'ranked by', *METRICS), dict.fromkeys(rows))}\n\n{note}"
