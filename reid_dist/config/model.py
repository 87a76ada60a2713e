"""Settings of the dual encoder."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from reid_dist.config.section import Count, Pixels, Section


class PromptConfig(Section):
    """Learned tokens inside the towers (methods.md card 2); below `depth` every block gets its own."""

    visual_length: Count = Field(4, description="prompts after the class token; 0: none")
    text_length: Count = Field(4, description="prompts after the start token; 0: none")
    visual_depth: int = Field(12, gt=0, description="blocks with prompts of their own; 1: shallow")
    text_depth: int = Field(12, gt=0, description="blocks with prompts of their own; 1: shallow")

    @model_validator(mode="after")
    def _some(self) -> "PromptConfig":
        if not self.visual_length and not self.text_length:
            raise ValueError("visual_length and text_length are both 0; give one of them, or remove model.prompts")
        return self


class WordGruConfig(Section):
    """A text tower of word vectors, a bidirectional GRU and max-pooling (TextReID, methods.md card 3)."""

    dictionary: Path | None = Field(
        None, description="word vectors, written by `python -m reid_dist.models.word_gru build`; none: learned words"
    )
    rows: int | None = Field(None, gt=2, description="of the table of words, for --dry-run without their file")
    train_words: bool = Field(False, description="the dictionary's vectors train too; learned words always do")
    features: int = Field(512, gt=0, description="of a word in the GRU; a dictionary of another width is mapped")
    hidden: int = Field(512, gt=0, description="of the GRU in each direction")
    context_length: int = Field(105, ge=3, description="words of a caption; longer ones are cut")
    padding: Literal["masked", "published"] = Field(
        "masked", description="masked: padding is never the maximum; published: its zeros are, as TextReID ships"
    )


class ModelConfig(Section):
    """The dual encoder."""

    architecture: str = Field(description="open_clip name, or path of a .json file of the same form")
    weights: str | None = Field(None, description="weights file, exported stage folder, or open_clip:TAG; none: random")
    visual_weights: str | None = Field(
        None, description="of the image tower alone: file, or timm: for those of the architecture's own backbone"
    )
    image_size: tuple[Pixels, Pixels] = Field((384, 128), description="height, width in pixels")
    patch_stride: int | None = Field(None, description="pixels; less than the patch size: overlapping ViT patches")
    position_interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    gradient_checkpointing: bool = False
    image_mean: tuple[float, float, float] = Field((0.48145466, 0.4578275, 0.40821073), description="of 0..1 images")
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    vocabulary: Path | None = Field(None, description="word list, one a line; none: the architecture's own tokenizer")
    sync_batch_norm: bool = Field(False, description="GPUs only: BatchNorm towers normalise over all ranks")
    prompts: PromptConfig | None = Field(None, description="learned tokens inside both towers; none: none")
    dual_token: bool = Field(False, description="a class token of their own for image queries (HPL)")
    word_gru: WordGruConfig | None = Field(None, description="instead of the architecture's text tower")
    projection: int | None = Field(None, gt=0, description="a further linear map on each tower to so many features")
    last_stride: Literal[1, 2] = Field(2, description="of a CLIP ResNet's last stage; 1 doubles its map's sides")
    attention_pool: Literal["keep", "redrawn"] = Field(
        "keep", description="of a CLIP ResNet: its weights, or projections drawn anew, as TextReID's code does"
    )

    @model_validator(mode="after")
    def _words_known(self) -> "ModelConfig":
        if self.word_gru is not None:
            if self.word_gru.dictionary is None and self.vocabulary is None:
                raise ValueError("word_gru: words are learned, but which ones? set vocabulary, or word_gru.dictionary")
            if self.word_gru.dictionary is not None and self.vocabulary is not None:
                raise ValueError("vocabulary: word_gru.dictionary brings its own words; remove the key")
            if self.prompts is not None and self.prompts.text_length:
                raise ValueError("prompts.text_length: word_gru has no blocks to put prompts into; set it to 0")
        return self
