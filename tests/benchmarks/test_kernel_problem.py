"""The kernel benchmark's inputs, its float64 answers, and every implementation that it compares."""

import math
import types
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reid_dist.benchmarks import kernel_peers, kernel_plain, kernel_problem
from reid_dist.benchmarks.kernel_peers import OURS, Contestant, contestants
from reid_dist.benchmarks.kernel_problem import Answer, Cell, Inputs, make_inputs, parse_size, reference_answers
from reid_dist.errors import UserError

CPU = torch.device("cpu")
QUEUE = Cell("moco_nce", 13, 97, 24, "float32")
PAIRS = Cell("clip_contrastive", 19, 19, 24, "float32")


def answer_of(contestant: Contestant, inputs: Inputs) -> Answer:
    for leaf in inputs.leaves:
        leaf.grad = None
    loss = contestant.build(inputs)()
    assert loss is not None
    loss.backward()
    return Answer(loss.detach(), [leaf.grad for leaf in inputs.leaves])


def named(cell: Cell, key: str) -> Contestant:
    return next(contestant for contestant in contestants(cell) if contestant.key == key)


@pytest.mark.parametrize("cell", [QUEUE, replace(QUEUE, dtype="bfloat16"), replace(QUEUE, b=120), PAIRS])
def test_inputs(cell: Cell) -> None:
    inputs, again = make_inputs(cell, CPU), make_inputs(cell, CPU)
    tensors = ("anchors_BD", "keys_KD", "positives_BD", "targets_B", "anchor_ids_B", "key_ids_K", "log_scale")
    assert all(torch.equal(getattr(inputs, name), getattr(again, name)) for name in tensors)
    assert inputs.anchors_BD.shape == (cell.b, cell.d) and inputs.keys_KD.shape == (cell.k, cell.d)
    assert inputs.anchors_BD.dtype == inputs.keys_KD.dtype == kernel_problem.DTYPES[cell.dtype]
    assert torch.equal(inputs.positives_BD, inputs.keys_KD[inputs.targets_B])
    assert torch.equal(inputs.anchor_ids_B, inputs.key_ids_K[inputs.targets_B])
    assert inputs.key_ids_K.dtype == torch.int32 and inputs.key_ids_K.bincount().max() == 4
    for features in (inputs.anchors_BD, inputs.keys_KD):
        assert (features.detach().float().norm(dim=1) - 1).abs().max() < (1e-5 if cell.dtype == "float32" else 1e-2)
    cosine_B = (inputs.anchors_BD.detach().float() * inputs.positives_BD.float()).sum(1)
    assert 0.5 < cosine_B.mean() < 0.85  # neither solved nor hopeless
    assert all(leaf.requires_grad and leaf.is_leaf for leaf in inputs.leaves)
    assert len(inputs.leaves) == (3 if cell.op == "clip_contrastive" else 2)
    assert inputs.keys_KD.requires_grad == (cell.op == "clip_contrastive")


def softmax_by_hand(logits: list[float], counted: list[bool]) -> list[float]:
    top = max(x for x, c in zip(logits, counted, strict=True) if c)
    weights = [math.exp(x - top) if c else 0.0 for x, c in zip(logits, counted, strict=True)]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("block_bytes", [2**29, 8 * 97 * 5])
@pytest.mark.parametrize("problem", ["identity", "none", "target"])
def test_float64_answers_by_hand(problem: Any, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients by the formulas, a row at a time, in plain Python."""
    monkeypatch.setattr(kernel_problem, "_REFERENCE_BYTES", block_bytes)
    inputs = make_inputs(QUEUE, CPU)
    scale = math.exp(float(inputs.log_scale.detach()))
    anchors, keys = inputs.anchors_BD.detach().double(), inputs.keys_KD.double()
    loss, gradient, scale_gradient = 0.0, torch.zeros_like(anchors), 0.0
    for i in range(QUEUE.b):
        logits = [scale * float(anchors[i] @ key) for key in keys]
        counted = [problem != "identity" or bool(inputs.anchor_ids_B[i] != inputs.key_ids_K[j]) for j in range(QUEUE.k)]
        target, columns = int(inputs.targets_B[i]), keys
        if problem != "target":  # the positive is a column of its own
            logits, counted, columns = (
                [*logits, logits[target]],
                [*counted, True],
                torch.cat([keys, keys[target, None]]),
            )
            target = QUEUE.k
        p = softmax_by_hand(logits, counted)
        loss -= math.log(p[target]) / QUEUE.b
        pulled = torch.tensor(p, dtype=torch.float64) @ columns - columns[target]
        gradient[i] = scale * pulled / QUEUE.b
        scale_gradient += float(anchors[i] @ gradient[i])
    by_hand = Answer(torch.tensor(loss), [gradient, torch.tensor(scale_gradient)])
    assert max(filter(None, reference_answers(inputs)[problem].errors(by_hand))) < 1e-6  # float32 scale above
    assert reference_answers(inputs)[problem].gradients[0].dtype == torch.float64


def test_float64_answer_of_pairs() -> None:
    inputs = make_inputs(PAIRS, CPU)
    logits = (inputs.log_scale.double().exp() * inputs.anchors_BD.double() @ inputs.keys_KD.double().T).detach()
    rows, columns = logits.softmax(1), logits.softmax(0)
    loss = -(rows.diag().log() + columns.diag().log()).mean() / 2
    pull = (rows + columns - 2 * torch.eye(19)) / (2 * 19)
    scale = inputs.log_scale.detach().double().exp()
    expected = [
        scale * pull @ inputs.keys_KD.detach().double(),
        scale * pull.T @ inputs.anchors_BD.detach().double(),
        (pull * logits).sum(),
    ]
    assert max(filter(None, reference_answers(inputs)["pairs"].errors(Answer(loss, expected)))) < 1e-12


def test_errors_are_relative_norms() -> None:
    true = Answer(torch.tensor(4.0), [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0]), torch.tensor(2.0)])
    found = Answer(torch.tensor(5.0), [torch.tensor([3.0, 3.0]), torch.tensor([4.0, 4.0]), torch.tensor(1.0)])
    assert found.errors(true) == (0.25, 1.0, 0.5)
    assert replace(found, gradients=[*found.gradients[:2], None]).errors(true) == (0.25, 1.0, None)
    assert replace(found, gradients=[None, *found.gradients[1:]]).errors(true)[1] is None


RUNNABLE = [
    (cell, contestant)
    for cell in (QUEUE, PAIRS)
    for contestant in contestants(cell)
    if contestant.missing(CPU) is None and not contestant.compiles
]


@pytest.mark.parametrize(
    ("cell", "contestant"), RUNNABLE, ids=[f"{cell.op}-{contestant.key}" for cell, contestant in RUNNABLE]
)
def test_every_implementation_computes_its_problem(
    cell: Cell, contestant: Contestant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_plain, "_CHECKPOINT_LOGITS", 5 * 97)
    inputs = make_inputs(cell, CPU)
    if contestant.name in kernel_peers.ROOF.values():
        assert contestant.build(inputs)() is None
        return
    errors = answer_of(contestant, inputs).errors(reference_answers(inputs)[contestant.problem])
    rough = "bf16" in contestant.name
    assert None not in errors and max(filter(None, errors)) < (5e-2 if rough else 1e-5)
    assert not rough or max(filter(None, errors)) > 1e-4  # it does round


@pytest.mark.parametrize("width", [97, 40])
def test_the_roof_is_the_bare_products(width: int) -> None:
    """Both in one pass over the keys, also in parts; read from the buffers that the step keeps."""
    inputs = make_inputs(QUEUE, CPU)
    logits = torch.empty(QUEUE.b * width)
    step = kernel_plain._products(inputs, width, logits)
    assert step() is None
    kept = dict(zip(step.__code__.co_freevars, (cell.cell_contents for cell in step.__closure__), strict=True))
    anchors, keys = inputs.anchors_BD.detach(), inputs.keys_KD
    assert torch.allclose(kept["out_BD"], anchors @ keys.T @ keys, atol=1e-4)
    last = keys[-(97 % width or 97) :]
    assert torch.allclose(logits[: QUEUE.b * len(last)].view(QUEUE.b, -1), anchors @ last.T, atol=1e-5)


def test_naive_takes_the_temperature_before_the_mask() -> None:
    """0 * -inf would be its gradient otherwise."""
    inputs = make_inputs(QUEUE, CPU)
    assert answer_of(named(QUEUE, "naive/identity"), inputs).gradients[-1].isfinite()


@pytest.mark.slow
@pytest.mark.parametrize("cell", [QUEUE, PAIRS])
def test_the_compiled_form_computes_its_problem(cell: Cell) -> None:
    inputs = make_inputs(cell, CPU)
    contestant = next(found for found in contestants(cell) if found.name == "naive_compiled")
    errors = answer_of(contestant, inputs).errors(reference_answers(inputs)[contestant.problem])
    assert max(filter(None, errors)) < 1e-5


# Other projects' packages, replaced by plain torch behind their published signatures


def cross_entropy_package(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def linear_cross_entropy(e: Tensor, c: Tensor, targets: Tensor, **options: Any) -> Tensor:
        calls.append(options)
        return F.cross_entropy(e @ c.T, targets)

    members = types.SimpleNamespace(__members__=dict.fromkeys(names))
    module = types.SimpleNamespace(linear_cross_entropy=linear_cross_entropy, LinearCrossEntropyImpl=members)
    replace_import(monkeypatch, {"cut_cross_entropy": module})
    return calls


def replace_import(monkeypatch: pytest.MonkeyPatch, modules: dict[str, Any]) -> None:
    monkeypatch.setattr(kernel_peers.importlib, "import_module", lambda name: modules[name])


def check(key: str, cell: Cell = QUEUE) -> None:
    inputs, contestant = make_inputs(cell, CPU), named(cell, key)
    errors = answer_of(contestant, inputs).errors(reference_answers(inputs)[contestant.problem])
    assert None not in errors and max(filter(None, errors)) < 1e-5


def test_cut_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = cross_entropy_package(monkeypatch, ("CCE", "TORCH_COMPILE"))
    for key in ("cce/target", "cce_exact/target", "cce_torch_compile/target"):
        check(key)
    assert calls == [{"impl": "cce"}, {"filter_eps": None}, {"impl": "torch_compile"}]
    calls = cross_entropy_package(monkeypatch, ("CCE", "CCE_EXACT"))
    check("cce_exact/target")
    assert calls == [{"impl": "cce_exact"}]


def test_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(weight: Tensor, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(x @ weight.T, target)

    module = types.SimpleNamespace(LigerFusedLinearCrossEntropyLoss=lambda: loss)
    replace_import(monkeypatch, {"liger_kernel.transformers.fused_linear_cross_entropy": module})
    check("liger/target")


def test_quack(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(x @ weight.T, target)

    module = types.SimpleNamespace(chunked_linear_cross_entropy=loss)
    replace_import(monkeypatch, {"quack.linear_cross_entropy": module})
    check("quack/target")


def test_inf_cl(monkeypatch: pytest.MonkeyPatch) -> None:
    heads: list[int] = []

    def loss(q: Tensor, k: Tensor, labels: Tensor, scale: Tensor, head_dim: int) -> Tensor:
        heads.append(head_dim)
        return F.cross_entropy(scale * q.view(len(q), -1, head_dim).flatten(1) @ k.T, labels, reduction="none")

    replace_import(monkeypatch, {"inf_cl.flash": types.SimpleNamespace(cal_flash_loss=loss)})
    check("inf_cl/target")
    check("inf_cl/pairs", PAIRS)
    assert set(heads) == {8}


def test_flex_attention_computes_the_masked_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled and without a backward, which it has on a GPU alone."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    inputs = make_inputs(QUEUE, CPU)
    for leaf in inputs.leaves:
        leaf.requires_grad_(False)
    loss = named(QUEUE, "flex_attention/identity").build(inputs)()
    assert loss is not None
    true = reference_answers(make_inputs(QUEUE, CPU))["identity"].loss
    assert abs(float(loss) - float(true)) < 1e-5 * float(true)


def test_what_is_missing_says_so() -> None:
    reasons = {contestant.name: contestant.missing(CPU) for contestant in contestants(QUEUE)}
    assert reasons["triton"] == "needs a CUDA device" and reasons["chunked"] is None
    cuda = {contestant.name: contestant.missing(torch.device("cuda")) for contestant in contestants(QUEUE)}
    assert cuda["triton"] is None and cuda["flex_attention"] is None
    absent = Contestant("x", "target", kernel_plain.roof, (), package=("no_such_package_at_all", "no-such-package"))
    assert absent.missing(CPU) == "not installed: pip install no-such-package"


def test_ours_can_everything_and_others_say_what_not() -> None:
    for cell in (QUEUE, PAIRS):
        found = contestants(cell)
        assert found[0].name == kernel_peers.ROOF[cell.op] and len({c.key for c in found}) == len(found)
        for contestant in found[1:]:
            assert (contestant.cannot is None) == (contestant.name in OURS)
            if contestant.problem == "target":
                assert contestant.cannot and "mask" in contestant.cannot


@pytest.mark.parametrize("text", ["512x65536", "512x0x4", "ax3x4", "1x2x3x4", "", "-1x2x3", "1 x2x3"])
def test_a_wrong_size(text: str) -> None:
    with pytest.raises(UserError, match=r"--sizes .*write anchors x keys x features"):
        parse_size(text)
    assert parse_size("512x65536x512") == (512, 65536, 512)
