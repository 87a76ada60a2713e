"""Settings of the losses of the stages."""

from typing import Literal

from pydantic import Field, model_validator

from reid_dist.config.section import Momentum, NotNegative, Positive, Section


class ContrastiveLoss(Section):
    """Image-text contrastive loss within the global batch, or against a queue of momentum keys (CM-MoCo)."""

    temperature: Positive | None = Field(
        None, description="fixed divisor of the cosine, as published 0.07; none: learned, from the weights' own"
    )
    queue_size: int = Field(
        0, ge=0, lt=2**31, description="latest keys of each modality over all ranks; 0: the global batch, no queue"
    )
    queue_init: Literal["empty", "random_as_published"] = Field(
        "empty", description="empty: no negatives before the first keys; random: parallel vectors that count"
    )
    queue_mask: Literal["identity", "batch"] = Field(
        "identity", description="keys that are no negatives: those of the anchor's identity, or of any in the step"
    )
    queue_sharded: bool = Field(False, description="each rank holds a share, for queues beyond a few GB")
    queue_check_every: int = Field(100, ge=0, description="steps between checks that the ranks' queues agree; 0: none")
    in_batch_negatives: bool = Field(False, description="the current keys of all ranks are negatives too")
    momentum: Momentum = Field(0.999, description="of the key encoders: share of their weights that a step keeps")
    key_head: Literal["momentum", "live"] = Field(
        "momentum", description="last projection of the key encoders: averaged, or the current one as TextReID ships"
    )

    @model_validator(mode="after")
    def _queue_settings_have_a_queue(self) -> "ContrastiveLoss":
        idle = [
            name
            for name, field in type(self).model_fields.items()
            if name.startswith(("queue_", "in_batch")) and name != "queue_size" and getattr(self, name) != field.default
        ]
        if idle and not self.queue_size:
            raise ValueError(f"{', '.join(idle)}: without a queue (queue_size: 0); set queue_size, or remove them")
        if self.in_batch_negatives and self.queue_mask == "batch":
            raise ValueError(
                "queue_mask: batch leaves out all keys of the step, in_batch_negatives adds them; choose identity"
            )
        return self


class PretrainLoss(ContrastiveLoss):
    """Loss of generic pairs: the own pair is the only positive."""

    objective: Literal["softmax", "sigmoid"] = Field(
        "softmax", description="CLIP's over the batch or a queue, or SigLIP's for each pair by itself"
    )

    @model_validator(mode="after")
    def _sigmoid_has_no_queue(self) -> "PretrainLoss":
        if self.objective == "sigmoid" and self.queue_size:
            raise ValueError("objective: sigmoid compares within the global batch; set queue_size to 0")
        return self


class TextLoss(ContrastiveLoss):
    """Losses between images and captions of identities, each with its weight."""

    positives: Literal["identity", "pair"] = Field(
        "identity", description="of the contrastive loss: all pairs of one identity, or the own pair only"
    )
    contrastive_weight: NotNegative = 1.0
    key_start: Literal["copy", "redrawn"] = Field(
        "copy", description="of the key encoders: the encoder's weights; redrawn: as TextReID's code, projections anew"
    )
    sdm_weight: NotNegative = Field(0.0, description="of IRRA's similarity distribution matching")
    alignment_weight: NotNegative = Field(0.0, description="of TextReID's (ViTAA's) alignment loss")
    identity_weight: NotNegative = Field(0.0, description="of the mean of both modalities' identity losses")
    classifier: Literal["linear", "normalised", "neck", "shared", "prototypes"] = Field(
        "linear",
        description="of both modalities: IRRA's, TextReID's, with a BNNeck, or that of the i2i stage's images;"
        " prototypes: of captions alone, against the mean image feature of each identity",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    mlm_weight: NotNegative = Field(0.0, description="of IRRA's masked words, found again with the image's help")
    mlm_depth: int = Field(4, gt=0, description="blocks of the cross-modal encoder")
    mask: Literal["words", "tokens"] = Field("words", description="hidden as a whole; tokens: as IRRA publishes")
    mask_for: Literal["mlm", "all"] = Field(
        "mlm", description="losses that see captions with hidden words; all: as in IRRA's code, which hides in place"
    )
    mask_probability: float = Field(0.15, gt=0, lt=1, description="share of a caption's words that are hidden")

    @property
    def with_prototypes(self) -> bool:
        """Whether captions are told apart by the identities' mean image features."""
        return self.identity_weight > 0 and self.classifier == "prototypes"

    @model_validator(mode="after")
    def _no_idle_settings(self) -> "TextLoss":
        if not self.contrastive_weight and self.changed("positives"):
            raise ValueError("positives: of the contrastive loss alone; set contrastive_weight, or remove the key")
        if not self.contrastive_weight and self.queue_size:
            raise ValueError("queue_size: without a contrastive loss; set contrastive_weight, or remove the key")
        if not self.mlm_weight and (idle := self.changed("mlm_depth", "mask", "mask_for", "mask_probability")):
            raise ValueError(f"{', '.join(idle)}: without mlm_weight; set it, or remove them")
        if not self.identity_weight and (idle := self.changed("classifier", "label_smoothing")):
            raise ValueError(f"{', '.join(idle)}: without identity_weight; set it, or remove them")
        if not self.queue_size and self.key_start != "copy":
            raise ValueError("key_start: without a queue there are no key encoders; set queue_size, or remove it")
        weights = ("contrastive", "sdm", "alignment", "identity", "mlm")
        if not any(getattr(self, f"{name}_weight") for name in weights):
            raise ValueError(f"{', '.join(f'{name}_weight' for name in weights)} are all 0; give one of them")
        return self


class I2ILoss(Section):
    """Losses of the image-to-image stage, and of a joint stage: with text_weight."""

    label_smoothing: float = Field(0.1, ge=0, lt=1)
    identity_weight: NotNegative = 1.0
    triplet_weight: NotNegative = 1.0
    triplet_margin: NotNegative | None = Field(0.3, description="none: soft, log(1 + exp(...))")
    image_rows: Literal["all", "uncaptioned"] = Field(
        "all", description="images of these losses; uncaptioned: in a mix, those of the sets without captions"
    )
    sharded_classifier: bool = Field(
        False, description="each rank holds a share of the classifier; for 10^5 identities and more"
    )
    sampling_rate: float = Field(
        1.0, gt=0, le=1, description="of the sharded classifier: share of the identities that a step contrasts with"
    )
    identity_text_weight: NotNegative = Field(
        0.0, description="of the contrast with the identities' learned sentences, from an identity_prompt stage before"
    )
    text_weight: NotNegative = Field(0.0, description="of the losses with the captions; 0: no text supervision")
    text: TextLoss = TextLoss()
    conflict_every: int = Field(
        0, ge=0, description="steps between cosines of the two tasks' gradients for each block; 0: none"
    )

    @model_validator(mode="after")
    def _no_idle_settings(self) -> "I2ILoss":
        if not self.text_weight and (idle := self.changed("text", "image_rows", "conflict_every")):
            raise ValueError(f"{', '.join(idle)}: without text_weight; set it, or remove them")
        if not self.sharded_classifier and self.sampling_rate < 1:
            raise ValueError("sampling_rate: of the sharded classifier alone; set sharded_classifier, or remove it")
        return self


class IdentityPromptLoss(Section):
    """Stage 1 of CLIP-ReID: sentences of each identity, learned against its images."""

    tokens: int = Field(4, gt=0, description="learned tokens of an identity")
    template: str = Field("a photo of a {} person.", description="the sentence; {} stands for the tokens")
    products: Literal["cosine", "plain"] = Field(
        "cosine", description="cosines over the temperature, or features multiplied as they come, as CLIP-ReID does"
    )
    temperature: Positive | None = Field(None, description="fixed divisor of the cosine; none: the weights' own")

    @model_validator(mode="after")
    def _sentence(self) -> "IdentityPromptLoss":
        if self.template.count("{}") != 1:
            raise ValueError(f"template: {self.template!r} must have one {{}}, where the learned tokens go")
        if self.products == "plain" and self.temperature is not None:
            raise ValueError("temperature: plain products have none; remove the key, or set products to cosine")
        return self
