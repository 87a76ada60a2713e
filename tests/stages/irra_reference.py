"""IRRA from its formulas in plain torch: CLIP's towers, SDM, identity loss and masked words (methods.md card A).

Written beside the code, not from it: shared are the names of parameters and nothing else. `p` holds the parameters by
name, in float64. Shape suffixes: B rows, L words, N image tokens, M keys, D width, V vocabulary, C identities.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

Parameters = Mapping[str, Tensor]


def linear(p: Parameters, name: str, x: Tensor) -> Tensor:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def layer_norm(p: Parameters, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def quick_gelu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-1.702 * x))


def attention(p: Parameters, name: str, query_BLD: Tensor, key_BMD: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Head after head; keys are the values too."""
    weights, biases = p[f"{name}.in_proj_weight"].chunk(3), p[f"{name}.in_proj_bias"].chunk(3)
    size, found = query_BLD.shape[-1] // heads, []
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        q, k, v = (
            x @ weight[own].T + bias[own]
            for x, weight, bias in zip((query_BLD, key_BMD, key_BMD), weights, biases, strict=True)
        )
        score_BLM = q @ k.transpose(1, 2) / size**0.5
        if causal:
            later_LM = torch.ones(score_BLM.shape[1:], dtype=torch.bool).triu(1)
            score_BLM = score_BLM.masked_fill(later_LM, -torch.inf)
        found.append(score_BLM.softmax(-1) @ v)
    return linear(p, f"{name}.out_proj", torch.cat(found, -1))


def block(p: Parameters, name: str, x: Tensor, heads: int, causal: bool = False) -> Tensor:
    normed = layer_norm(p, f"{name}.ln_1", x)
    x = x + attention(p, f"{name}.attn", normed, normed, heads, causal)
    inner = quick_gelu(linear(p, f"{name}.mlp.c_fc", layer_norm(p, f"{name}.ln_2", x)))
    return x + linear(p, f"{name}.mlp.c_proj", inner)


def blocks(p: Parameters, name: str, x: Tensor, heads: int, causal: bool = False) -> Tensor:
    count = 0
    while f"{name}.{count}.ln_1.weight" in p:
        x = block(p, f"{name}.{count}", x, heads, causal)
        count += 1
    assert count
    return x


def image_tokens(p: Parameters, image_BCHW: Tensor, heads: int, name: str = "encoder.visual") -> Tensor:
    """All projected tokens, the class token first. Shape: (B, N, D)."""
    filters = p[f"{name}.conv1.weight"]
    rows, channels, height, width = image_BCHW.shape
    size = filters.shape[-1]
    cut = image_BCHW.reshape(rows, channels, height // size, size, width // size, size).permute(0, 2, 4, 1, 3, 5)
    x = cut.reshape(rows, -1, channels * size * size) @ filters.flatten(1).T
    x = torch.cat([p[f"{name}.class_embedding"].expand(rows, 1, -1), x], 1) + p[f"{name}.positional_embedding"]
    x = blocks(p, f"{name}.transformer.resblocks", layer_norm(p, f"{name}.ln_pre", x), heads)
    return layer_norm(p, f"{name}.ln_post", x) @ p[f"{name}.proj"]


def text_tokens(p: Parameters, token_BL: Tensor, heads: int, name: str = "encoder.text") -> Tensor:
    """All projected tokens, padding included. Shape: (B, L, D)."""
    x = p[f"{name}.token_embedding.weight"][token_BL] + p[f"{name}.positional_embedding"]
    x = blocks(p, f"{name}.transformer.resblocks", x, heads, causal=True)
    return layer_norm(p, f"{name}.ln_final", x) @ p[f"{name}.text_projection"]


def cross_modal_logits(p: Parameters, name: str, text_BLD: Tensor, image_BND: Tensor) -> Tensor:
    """A4. Shape: (B, L, V)."""
    heads = max(1, text_BLD.shape[-1] // 64)
    query, key = layer_norm(p, f"{name}norm_text", text_BLD), layer_norm(p, f"{name}norm_image", image_BND)
    x = attention(p, f"{name}cross_attention", query, key, heads)
    x = layer_norm(p, f"{name}norm_out", blocks(p, f"{name}cross_blocks", x, heads))
    hidden = layer_norm(p, f"{name}mlm_head.2", quick_gelu(linear(p, f"{name}mlm_head.0", x)))
    return linear(p, f"{name}mlm_head.3", hidden)


def cross_entropy(logits_XV: Tensor, label_X: Tensor) -> Tensor:
    log_sum = logits_XV.exp().sum(-1).log()
    return (log_sum - logits_XV[torch.arange(len(label_X)), label_X]).mean()


def sdm(image_BD: Tensor, text_BD: Tensor, pid_B: Tensor, temperature: float, epsilon: float = 1e-8) -> Tensor:
    """A1, one anchor after the other."""
    image = image_BD / image_BD.square().sum(1, keepdim=True).sqrt()
    text = text_BD / text_BD.square().sum(1, keepdim=True).sqrt()
    total = torch.zeros((), dtype=image.dtype)
    for anchors, others in ((image, text), (text, image)):
        for anchor, pid in zip(anchors, pid_B, strict=True):
            score = others @ anchor / temperature
            p = score.softmax(0)
            q = (pid_B == pid).double() / (pid_B == pid).sum()
            total = total + (p * (score.log_softmax(0) - (q + epsilon).log())).sum() / len(pid_B)
    return total


def irra_parts(
    p: Parameters, batch: Mapping[str, Tensor], heads: tuple[int, int], temperature: float, in_place: bool
) -> dict[str, Tensor]:
    """The three losses of a batch.

    `heads` are those of the image and the text tower. `in_place`: the captions of SDM and identity loss have the
    hidden words too, because the published code hides them in memory that both share.
    """
    images = image_tokens(p, batch["image_BCHW"], heads[0])
    texts = text_tokens(p, batch["masked_token_BL" if in_place else "token_BL"], heads[1])
    masked = text_tokens(p, batch["masked_token_BL"], heads[1])
    image_BD = images[:, 0]
    text_BD = texts[torch.arange(len(texts)), batch["token_BL"].argmax(1)]
    classifier, pid_B, label_BL = "text_losses.classifier.classifier", batch["pid_B"], batch["masked_label_BL"]
    image_ce, text_ce = (cross_entropy(linear(p, classifier, x), pid_B) for x in (image_BD, text_BD))
    logits = cross_modal_logits(p, "text_losses.cross_modal.", masked, images)
    asked = label_BL >= 0
    return {
        "sdm": sdm(image_BD, text_BD, pid_B, temperature),
        "identity": (image_ce + text_ce) / 2,
        "mlm": cross_entropy(logits[asked], label_BL[asked]),
    }
