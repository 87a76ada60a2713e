"""ONNX: one file for images, one for sentences, written only when onnxruntime gives the features of torch.

Shape suffixes: B batch, C channels, H rows, W columns, L tokens, D features.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from reid_dist.data.tokenizer import WordTokenizer
from reid_dist.errors import UserError
from reid_dist.metrics import say
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.trained import TrainedModel

TOLERANCE = 1e-4
SENTENCES = ("a person in a red coat", "A man; he wears blue jeans.", "a" + " long" * 999, "red", "?")
_BATCHES = (1, 5)  # the files are made with 2
# A file of protocol buffers ends at 2 GB: weights beyond this many bytes stand in a file beside it.
_ONE_FILE_BYTES = 1_500_000_000


class ImageEncoder(nn.Module):
    """uint8 pixels in, features of length 1 out; those for image queries too where the model has a second token."""

    def __init__(self, encoder: DualEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Shape: (B, 3, H, W) -> (B, D) once or twice."""
        no_text = image_BCHW.new_zeros(0)
        # The whole encoder with features of text that it need not make: both kinds of image features in one pass.
        output = self.encoder(image_BCHW, no_text, text_features=no_text)
        kinds = [output.image_features] + ([] if output.i2i_features is None else [output.i2i_features])
        return tuple(normalize(features_BD.float(), dim=1) for features_BD in kinds)


class TextEncoder(nn.Module):
    """Token ids in, features of length 1 out."""

    def __init__(self, encoder: DualEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, token_BL: Tensor) -> tuple[Tensor, ...]:
        """Shape: (B, L) -> (B, D)."""
        return (normalize(self.encoder.encode_text(token_BL).float(), dim=1),)


def write_onnx(model: TrainedModel, folder: Path, opset: int | None) -> tuple[float, dict[str, Any]]:
    """Writes `image.onnx` and `text.onnx`, both for batches of any size.

    Args:
        model: on the CPU.
        folder: where to.
        opset: version of ONNX's operators; None: the one that torch prefers.

    Returns:
        The largest difference of a feature between onnxruntime and torch, and what whoever runs them must know.

    Raises:
        UserError: a package is missing, torch cannot translate the model, or the features differ.
    """
    _require_packages()
    images = ["feature", "feature_i2i"] if model.encoder.has_i2i_token else ["feature"]
    image_BCHW = torch.randint(0, 256, (max(_BATCHES), 3, *model.image_size), dtype=torch.uint8, generator=_seeded())
    token_BL = model.tokenizer(SENTENCES)
    found = _write(ImageEncoder(model.encoder), "image", image_BCHW, images, folder, opset)
    worst = max(found[0], _write(TextEncoder(model.encoder), "text", token_BL, ["feature"], folder, opset)[0])
    return worst, {"opset": found[1], "image": _image_notes(model, images), "text": text_notes(model)}


def text_notes(model: TrainedModel) -> dict[str, Any]:
    """How sentences become token ids, in words and by an example."""
    tokenizer, example = model.tokenizer, SENTENCES[1]
    notes: dict[str, Any] = {"input": f"int64 (batch, {tokenizer.context_length})", "outputs": ["feature"]}
    if isinstance(tokenizer, WordTokenizer):
        first, _ = tokenizer.word_ids
        framed = model.manifest["model"].get("word_gru") is None
        notes["tokenizer"] = {
            "kind": "words: lower case, split at all but a-z and 0-9, cut to what fits, padded with 0",
            "pad": 0,
            "unknown": 1,
            "start": 2 if framed else None,
            "end": tokenizer.end if framed else None,
            "first_word": first,
            "words": tokenizer.words,
        }
    else:
        notes["tokenizer"] = {"kind": f"open_clip's of {model.manifest['model']['architecture']}"}
    return {**notes, "example": {"sentence": example, "tokens": tokenizer([example])[0].tolist()}}


def _image_notes(model: TrainedModel, outputs: list[str]) -> dict[str, Any]:
    height, width = model.image_size
    return {
        "input": f"uint8 (batch, 3, {height}, {width}), RGB, resized with bicubic interpolation; not normalised",
        "outputs": outputs,
    }


def _write(
    encoder: nn.Module, name: str, example: Tensor, outputs: list[str], folder: Path, opset: int | None
) -> tuple[float, int]:
    """Writes one file; returns the largest difference and the version of its operators."""
    say(f"{name} encoder: translating and checking")
    path = folder / f"{name}.onnx"
    with _translating():
        try:
            program = torch.onnx.export(
                encoder.eval(),
                (example[:2],),
                input_names=[name],
                output_names=outputs,
                opset_version=opset,
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
        except Exception as error:  # torch, onnxscript and onnx raise many kinds
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"--format onnx: torch cannot translate the {name} encoder ({reason}); choose --format safetensors"
            ) from error
        expected = {batch: encoder(example[:batch]) for batch in _BATCHES}
    assert program is not None
    written = int(program.model.opset_imports[""])
    if opset is not None and written != opset:
        raise UserError(f"--opset {opset}: torch writes {written} instead for this model; choose that or leave it out")
    for node in program.model.graph.all_nodes():  # files and lines of this machine
        node.metadata_props.clear()
    large = sum(tensor.nbytes for tensor in encoder.state_dict().values()) > _ONE_FILE_BYTES
    program.save(path, external_data=large)
    return _check(path, name, example, expected), written


def _check(path: Path, name: str, example: Tensor, expected: dict[int, tuple[Tensor, ...]]) -> float:
    """The largest difference of a feature between onnxruntime and torch.

    Raises:
        UserError: onnxruntime cannot run the file, or the features differ.
    """
    runtime = import_module("onnxruntime")
    differences: list[Tensor] = []
    try:
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for batch, features in expected.items():
            found = session.run(None, {name: example[:batch].numpy()})
            differences += [(torch.from_numpy(a) - b).abs().max() for a, b in zip(found, features, strict=True)]
    except Exception as error:  # onnxruntime's errors share no class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--format onnx: onnxruntime cannot run the {name} encoder ({reason}); update it") from error
    worst = float(torch.stack(differences).max())  # nan where there is one
    if not worst <= TOLERANCE:
        raise UserError(
            f"--format onnx: the {name} encoder's features differ by {worst:.1e} from torch's, more than"
            f" {TOLERANCE:.0e}; choose --format safetensors"
        )
    return worst


def _require_packages() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            import_module(package)
        except ImportError:
            raise UserError(
                f"--format onnx: {package} is missing: install the extra: pip install -e '.[export]'"
            ) from None


@contextmanager
def _translating() -> Iterator[None]:
    """Attention as plain operators, no gradients, and no notes of torch's and onnxscript's developers."""
    fast, level = torch.backends.mha.get_fastpath_enabled(), logging.root.manager.disable
    torch.backends.mha.set_fastpath_enabled(False)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        torch.backends.mha.set_fastpath_enabled(fast)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
