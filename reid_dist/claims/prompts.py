"""Arms and claims of Prompt Decoupling: P1-P3 (methods.md card 2), with a vision transformer."""

from collections.abc import Mapping
from typing import Any

from reid_dist.claims.arms import GENERIC, Arm, Claim, Row, Task
from reid_dist.claims.conflicts import CAPTIONS, NO_DECAY, TEMPERATURE, text_loss, text_stage

_DEEP = 99  # every block that there is
_PROMPTS = {"visual_length": 4, "text_length": 4, "visual_depth": _DEEP, "text_depth": _DEEP}
_LR, _PROMPT_LR = 1e-3, 3e-3  # of towers, as configs/claims.yaml says, and of prompts
_STAGE_1 = 0.75  # length of the prompt stage; what has no such stage trains so much longer
_T2I: tuple[Task, ...] = ("t2i",)
_PROMPT_STAGE = {
    "kind": "prompt",
    "data": CAPTIONS,
    "loss": text_loss("pair"),
    # Few, and random at the start: rates as for prompts (methods.md 2.3), not as for weights.
    "optimizer": {"lr": _PROMPT_LR, "weight_decay": 0.0},
}
# Where prompts and towers train together each has the rate that it has alone, at the lr of configs/claims.yaml.
_PROMPTS_FASTER = {"rules": [NO_DECAY, {"contains": ["prompts"], "lr": _PROMPT_LR / _LR, "weight_decay": 0.0}]}


def _model(**changed: int) -> dict[str, Any]:
    return {"prompts": {**_PROMPTS, **changed}}


def _vit(
    name: str, about: str, stage: Mapping[str, Any], model: Mapping[str, Any] | None = None, length: float = 1.0,
    weights: str | None = "base-vit",
) -> Arm:  # fmt: skip
    return Arm(name, about, stage, model or {}, length, weights, transformer=True, scored=_T2I)


def _prompt_arms(name: str, about: str, **changed: int) -> tuple[Arm, Arm]:
    """Prompts alone, and behind them the towers with these prompts frozen."""
    model = _model(**changed)
    return (
        _vit(name, f"{about} alone, both towers frozen", _PROMPT_STAGE, model, _STAGE_1),
        _vit(f"{name}-tune", f"{about}, then the towers", text_stage(), model, weights=name),
    )


_PRETRAIN = {"kind": "pretrain", "data": {"train": [GENERIC]}, "loss": {"temperature": TEMPERATURE}}
_ARMS = (
    _vit("base-vit", "as base, with a ViT", _PRETRAIN, length=8, weights=None),
    _vit("direct", "both towers fine-tuned, no prompts", text_stage()),
    _vit("direct-long", "the same, as long as both stages", text_stage(), length=1 + _STAGE_1),
    *_prompt_arms("prompt", "deep prompts in both towers"),
    *_prompt_arms("prompt-text", "deep prompts in the text tower", visual_length=0),
    *_prompt_arms("prompt-image", "deep prompts in the image tower", text_length=0),
    *_prompt_arms("prompt-shallow", "prompts at the first block of both towers", visual_depth=1, text_depth=1),
    _vit("prompt-random", "random frozen prompts, then the towers", text_stage(), _model()),
    _vit("prompt-joint", "prompts and towers in one stage, as long as both",
        text_stage(train_prompts=True, optimizer=_PROMPTS_FASTER), _model(), 1 + _STAGE_1),
)  # fmt: skip
ARMS = {arm.name: arm for arm in _ARMS}

_SOURCE = "arXiv 2401.02173"
_DIFFERS = (
    "Lengths, depths and losses are our reconstruction; a small ViT on small pictures starts from generated pairs that"
    " cover the captions' words instead of CLIP."
)
_MAIN = "deep prompts, 4 in each block"
CLAIMS = (
    Claim("P1", "Prompts first, then the towers with frozen prompts, is better than fine-tuning at once.", _SOURCE,
        "all", (
            Row(_MAIN, "prompt-tune", "direct-long"),
            Row(_MAIN, "prompt-tune", "direct"),
            Row("controls", "prompt", "base-vit", decides=False),
            Row("controls", "prompt-tune", "prompt-random", decides=False),
            Row("controls", "prompt-tune", "prompt-shallow-tune", decides=False),
        ), _DIFFERS),
    Claim("P2", "Prompts first, then the towers, is better than both in one stage.", _SOURCE, "all",
        (Row(_MAIN, "prompt-tune", "prompt-joint"),), _DIFFERS),
    Claim("P3", "Prompts in both towers are better than in one.", _SOURCE, "all", (
            Row(_MAIN, "prompt-tune", "prompt-text-tune"),
            Row(_MAIN, "prompt-tune", "prompt-image-tune"),
            Row("without fine-tuning", "prompt", "prompt-text"),
            Row("without fine-tuning", "prompt", "prompt-image"),
        ), _DIFFERS),
)  # fmt: skip
