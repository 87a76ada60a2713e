"""A transformer of open_clip's form for one sample, token by token and head by head, from its named weights alone."""

import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def norm(x_W: Tensor, weights: Weights, name: str) -> Tensor:
    centred = x_W - x_W.sum() / len(x_W)
    variance = (centred**2).sum() / len(x_W)
    return centred / torch.sqrt(variance + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attend(tokens: list[Tensor], weights: Weights, heads: int, causal: bool) -> list[Tensor]:
    width = len(tokens[0])
    size = width // heads
    projected = [weights["attn.in_proj_weight"] @ x + weights["attn.in_proj_bias"] for x in tokens]
    query, key, value = ([x[i * width : (i + 1) * width] for x in projected] for i in range(3))
    result = []
    for i in range(len(tokens)):
        seen = range(i + 1) if causal else range(len(tokens))
        parts = []
        for head in range(heads):
            cut = slice(head * size, (head + 1) * size)
            scores = [math.exp(float(query[i][cut] @ key[j][cut]) / math.sqrt(size)) for j in seen]
            parts.append(sum(s / sum(scores) * value[j][cut] for s, j in zip(scores, seen, strict=True)))
        result.append(weights["attn.out_proj.weight"] @ torch.cat(parts) + weights["attn.out_proj.bias"])
    return result


def run_block(tokens: list[Tensor], weights: Weights, heads: int, causal: bool) -> list[Tensor]:
    mixed = attend([norm(x, weights, "ln_1") for x in tokens], weights, heads, causal)
    tokens = [x + y for x, y in zip(tokens, mixed, strict=True)]
    result = []
    for x in tokens:
        inner = gelu(weights["mlp.c_fc.weight"] @ norm(x, weights, "ln_2") + weights["mlp.c_fc.bias"])
        result.append(x + weights["mlp.c_proj.weight"] @ inner + weights["mlp.c_proj.bias"])
    return result


def run_blocks(
    first: list[Tensor], rest: list[Tensor], weights: Weights, layers: int, heads: int, causal: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of the tokens before and after the prompts, which lie in `weights["prompts"]` (J, M, W) or nowhere."""
    prompts = weights.get("prompts", torch.zeros(0, 0, 1))
    between: list[Tensor] = []
    for i in range(layers):
        if i < len(prompts):
            between = list(prompts[i])
        start = f"transformer.resblocks.{i}."
        own = {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}
        tokens = run_block(first + between + rest, own, heads, causal)
        end = len(first) + len(between)
        first, between, rest = tokens[: len(first)], tokens[len(first) : end], tokens[end:]
    return first, rest
