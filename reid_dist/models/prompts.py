"""Learned tokens between a transformer's blocks (Prompt Decoupling, methods.md card 2, our reconstruction).

Input of block i < J is [first tokens, P_i, the rest]: the P_i of each block replace what the block before made of its
own; from block J on the last outputs go through. They enter after the position embedding, which the other tokens keep.

Shape suffixes: B batch, N tokens, M prompts, J blocks with prompts of their own, W width of the transformer.
"""

import torch
from open_clip.transformer import Transformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reid_dist.errors import UserError


def new_prompts(transformer: Transformer, length: int, depth: int, key: str) -> nn.Parameter | None:
    """Prompts drawn from N(0, 0.02); None for a length of 0. Shape: (J, M, W).

    Args:
        transformer: that will hold them.
        length: M.
        depth: J.
        key: of the configuration, for the message.

    Raises:
        UserError: more depth than blocks.
    """
    if length == 0:
        return None
    if depth > transformer.layers:
        raise UserError(f"{key}: {depth}, but this tower has {transformer.layers} blocks; choose at most that")
    return nn.Parameter(0.02 * torch.randn(depth, length, transformer.width))


def insert(x_BNW: Tensor, new_MW: Tensor, at: int, instead_of: int = 0) -> Tensor:
    """The same M tokens in every row from position `at` on, instead of as many as told. Shape: (B, N + M - k, W)."""
    new_BMW = new_MW.to(x_BNW.dtype).expand(x_BNW.shape[0], -1, -1)
    return torch.cat([x_BNW[:, :at], new_BMW, x_BNW[:, at + instead_of :]], dim=1)


def run_blocks(
    transformer: Transformer, x_BNW: Tensor, prompts_JMW: Tensor | None, at: int, mask: Tensor | None = None
) -> Tensor:
    """All blocks, with prompts from position `at` on; without their outputs at the end.

    Args:
        transformer: whose blocks are called, and which knows whether they are recomputed in backward.
        x_BNW: tokens without prompts.
        prompts_JMW: None: none.
        at: position of the first prompt.
        mask: additive, for the tokens with prompts. Shape: (N + M, N + M).

    Returns:
        Shape: (B, N, W).
    """
    depth, length = (0, 0) if prompts_JMW is None else prompts_JMW.shape[:2]
    for i, block in enumerate(transformer.resblocks):
        if prompts_JMW is not None and i < depth:
            x_BNW = insert(x_BNW, prompts_JMW[i], at, instead_of=length if i else 0)
        if transformer.grad_checkpointing:
            x_BNW = checkpoint(block, x_BNW, attn_mask=mask, use_reentrant=False)
        else:
            x_BNW = block(x_BNW, attn_mask=mask)
    return torch.cat([x_BNW[:, :at], x_BNW[:, at + length :]], dim=1) if length else x_BNW
