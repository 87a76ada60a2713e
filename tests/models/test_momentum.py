"""Key encoders: the average against float64, the live head, BatchNorm's rule, casts, what is refused."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from reid_dist.errors import UserError
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.models.momentum import MomentumEncoder
from reid_dist.models.projection import projection_names
from tests.models.encoders import build

BOTH = ("visual", "text")
KINDS = ("vit", "resnet", "row_conv")


@pytest.fixture
def make_encoder(architectures: dict[str, str]):
    def make(kind: str = "row_conv") -> DualEncoder:
        torch.manual_seed(0)
        encoder = build(architectures[kind], (64, 32)).train()
        for parameter in encoder.parameters():  # open_clip starts a ResNet's blocks at zero
            nn.init.normal_(parameter, std=0.1)
        return encoder

    return make


def make_batch(rows: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    token = torch.randint(3, 49, (rows, 8), generator=generator)
    token[:, 7] = 49
    return torch.randint(0, 256, (rows, 3, 64, 32), generator=generator, dtype=torch.uint8), token


def constant(encoder: DualEncoder) -> DualEncoder:
    """A twin whose weights want no gradient: torch's CPU attention rounds differently for weights that do."""
    return copy.deepcopy(encoder).requires_grad_(False)


def weights_of(encoder: nn.Module, key_encoder: MomentumEncoder) -> Iterator[tuple[str, Tensor]]:
    """What an engine would yield: full tensors by the stage's names, in an order of its own."""
    state = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    return ((name, state[name]) for name in reversed(key_encoder.names))


def move(encoder: nn.Module, seed: int = 1) -> nn.Module:
    """Other weights and other running statistics."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in encoder.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand(tensor.shape, generator=generator))
        else:
            tensor.add_(3)
    return encoder


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def relative_norm(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    difference = torch.cat([(found[name].double() - x.double()).flatten() for name, x in expected.items()])
    return float(difference.norm() / torch.cat([x.double().flatten() for x in expected.values()]).norm())


# The average


def train_steps(encoder: DualEncoder, steps: int) -> Iterator[None]:
    """Real AdamW steps that pull the features of random pairs together."""
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    for step in range(steps):
        image, token = make_batch(2, step)
        output = encoder(image[:, :, ::4, ::4], token)
        loss = (output.image_features - output.text_features).square().mean() + 0 * output[2].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield


def test_a_thousand_steps_equal_a_float64_average_and_wrong_ways_do_not(make_encoder) -> None:
    encoder = make_encoder()
    keys = MomentumEncoder(encoder, BOTH, momentum=0.999)
    start = copy.deepcopy(keys.state())
    exact = {name: tensor.double() for name, tensor in start.items()}
    wrong = {"mul_add": copy.deepcopy(start), "bf16": {name: x.bfloat16() for name, x in start.items()}}
    for _ in train_steps(encoder, 1000):
        keys.update(weights_of(encoder, keys))
        for name, weight in weights_of(encoder, keys):
            exact[name].mul_(0.999).add_(weight.double(), alpha=0.001)
            wrong["mul_add"][name].mul_(0.999).add_(weight, alpha=1 - 0.999)
            wrong["bf16"][name].lerp_(weight.bfloat16(), 1 - 0.999)
    assert relative_norm(keys.state(), exact) < 1e-6
    assert relative_norm(wrong["mul_add"], exact) > 2e-6
    assert relative_norm(wrong["bf16"], exact) > 1e-3
    assert relative_norm(start, exact) > 0.01, "the weights moved too little to show anything"


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_an_update_is_the_weighted_mean(kind: str, momentum: float, make_encoder) -> None:
    encoder = make_encoder(kind)
    keys = MomentumEncoder(encoder, BOTH, momentum)
    old = copy.deepcopy(keys.state())
    keys.update(weights_of(move(encoder), keys))
    new = dict(weights_of(encoder, keys))
    for name, parameter in encoder.named_parameters():
        if name == "logit_scale":
            continue
        name = f"encoder.{name}"
        expected = momentum * old[name].double() + (1 - momentum) * new[name].double()
        torch.testing.assert_close(keys.state()[name].double(), expected, rtol=1e-6, atol=1e-7)
        assert parameter.shape == keys.state()[name].shape
        if momentum in (0, 1):
            assert keys.state()[name].equal(new[name] if momentum == 0 else old[name])


def test_start_takes_the_weights_as_they_are(make_encoder) -> None:
    encoder = make_encoder("resnet")
    keys = MomentumEncoder(encoder, BOTH)
    keys.start(weights_of(move(encoder), keys))
    assert_same(keys.state(), dict(weights_of(encoder, keys)))


def test_names_are_the_stage_s_parameters_and_stored_buffers_of_the_towers(make_encoder) -> None:
    stage = nn.Module()
    stage.encoder = make_encoder("resnet")
    for towers in (BOTH, ("visual",), ("text",)):
        expected = {name for name in stage.state_dict() if name.split(".")[1] in towers}
        keys = MomentumEncoder(stage.encoder, towers)
        assert set(keys.names) == expected and len(keys.names) == len(expected)
    assert "encoder.visual.bn1.num_batches_tracked" in MomentumEncoder(stage.encoder, ("visual",)).names


# The forward


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_copy_encodes_as_the_training_encoder(kind: str, make_encoder) -> None:
    encoder = make_encoder(kind).eval()
    keys = MomentumEncoder(encoder, BOTH)
    encoder = constant(encoder).train()
    image, token = make_batch()
    assert keys.encode_image(image).equal(encoder.encode_image(image))
    assert keys.encode_text(token).equal(encoder.encode_text(token))
    normalised = torch.randn(5, 3, 64, 32)
    assert keys.encode_image(normalised).equal(encoder.encode_image(normalised))


def test_keys_follow_the_average_and_not_the_encoder(make_encoder) -> None:
    encoder = make_encoder()
    keys = MomentumEncoder(encoder, BOTH, momentum=0.5)
    image, token = make_batch()
    before = keys.encode_image(image), keys.encode_text(token)
    move(encoder)
    assert keys.encode_image(image).equal(before[0]) and keys.encode_text(token).equal(before[1])
    keys.update(weights_of(encoder, keys))
    averaged = constant(encoder)
    averaged.load_state_dict({name.removeprefix("encoder."): x for name, x in keys.state().items()}, strict=False)
    assert keys.encode_image(image).equal(averaged.encode_image(image))
    assert keys.encode_text(token).equal(averaged.encode_text(token))


def test_keys_are_constants_that_a_loss_can_use(make_encoder) -> None:
    encoder = make_encoder()
    keys = MomentumEncoder(encoder, BOTH)
    image, token = make_batch()
    key = keys.encode_text(token)
    assert not key.requires_grad and not key.is_inference()
    encoder.encode_image(image).mul(key).sum().backward()
    assert all(p.grad is None for p in encoder.text.parameters())
    assert all(p.grad is not None for p in encoder.visual.parameters())


def test_a_frozen_tower_has_no_copy(make_encoder) -> None:
    encoder = make_encoder()
    keys = MomentumEncoder(encoder, ("text",))
    image, token = make_batch()
    assert keys.encode_text(token).equal(constant(encoder).encode_text(token))
    with pytest.raises(ValueError, match="visual tower is frozen"):
        keys.encode_image(image)
    assert keys.nbytes == sum(x.nbytes for x in encoder.text.state_dict().values())


def test_a_key_forward_recomputes_nothing(make_encoder, monkeypatch) -> None:
    encoder = make_encoder()
    encoder.set_grad_checkpointing(True)
    keys = MomentumEncoder(encoder, BOTH)
    for target in ("reid_dist.models.row_conv.checkpoint", "open_clip.transformer.checkpoint"):
        monkeypatch.setattr(target, lambda *args, **kwargs: pytest.fail("a key forward was checkpointed"))
    keys.encode_image(make_batch()[0])
    keys.encode_text(make_batch()[1])
    assert encoder.visual.gradient_checkpointing


# The compute dtype


@pytest.mark.parametrize("kind", KINDS)
def test_a_bf16_forward_reads_casts_of_fp32_averages(kind: str, make_encoder) -> None:
    encoder = make_encoder(kind)
    keys = MomentumEncoder(encoder, BOTH, 0.9, dtype=torch.bfloat16)
    plain = MomentumEncoder(encoder, BOTH, 0.9)
    image, token = make_batch()
    for step in range(3):
        move(encoder, step)
        keys.update(weights_of(encoder, keys))
        plain.update(weights_of(encoder, plain))
        assert_same(keys.state(), plain.state())
        cast = constant(encoder)
        cast.load_state_dict({name.removeprefix("encoder."): x for name, x in plain.state().items()}, strict=False)
        cast.visual.bfloat16()
        cast.text.bfloat16()
        assert keys.encode_image(image).equal(cast.encode_image(image))
        assert keys.encode_text(token).equal(cast.encode_text(token))
    assert keys.encode_text(token).dtype == torch.bfloat16


def test_a_bf16_forward_costs_half_the_averages_more(make_encoder) -> None:
    encoder = make_encoder()
    assert MomentumEncoder(encoder, BOTH, dtype=torch.bfloat16).nbytes == 1.5 * MomentumEncoder(encoder, BOTH).nbytes


# The head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_live_head_is_the_encoder_s_and_the_rest_is_averaged(kind: str, dtype: torch.dtype, make_encoder) -> None:
    encoder = make_encoder(kind)
    live = MomentumEncoder(encoder, BOTH, 0.9, "live", dtype)
    averaged = MomentumEncoder(encoder, BOTH, 0.9, "momentum", dtype)
    move(encoder)
    live.update(weights_of(encoder, live))
    averaged.update(weights_of(encoder, averaged))
    new = dict(weights_of(encoder, live))
    head = {f"encoder.{t}.{name}" for t in BOTH for name in projection_names(getattr(encoder, t))}
    assert head
    for name in live.names:
        assert live.state()[name].equal(new[name] if name in head else averaged.state()[name]), name
        if name in head:
            assert not averaged.state()[name].equal(new[name])
    assert live.digest() != averaged.digest()


def test_a_live_head_of_a_tower_without_projection_is_refused() -> None:
    with torch.device("meta"):
        encoder = build("ViT-B-16-SigLIP", (224, 224))
        MomentumEncoder(encoder, ("text",), head="live")
        with pytest.raises(UserError, match=r"loss\.key_head: live .* visual tower .*use momentum"):
            MomentumEncoder(encoder, BOTH, head="live")


# BatchNorm


@pytest.mark.parametrize("sync", [False, True])
def test_keys_are_normalised_by_their_own_batch(sync: bool, make_encoder) -> None:
    encoder = make_encoder("resnet")
    if sync:
        encoder = nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
    keys = MomentumEncoder(encoder, BOTH)
    image = make_batch()[0]
    encoder = constant(encoder)
    assert keys.encode_image(image).equal(encoder.encode_image(image))
    assert not keys.encode_image(image)[:3].equal(keys.encode_image(image[:3]))
    assert not keys.encode_image(image).equal(encoder.eval().encode_image(image))


@pytest.mark.parametrize("sync", [False, True])
def test_running_statistics_move_with_the_update_and_never_with_a_key_forward(sync: bool, make_encoder) -> None:
    encoder = make_encoder("resnet")
    if sync:
        encoder = nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
    keys = MomentumEncoder(encoder, BOTH, 0.9)
    start = copy.deepcopy(keys.state())
    image = make_batch()[0]
    keys.encode_image(image)
    keys.encode_image(torch.full((4, 3, 64, 32), torch.nan))
    assert_same(keys.state(), start)  # so a skipped step changes nothing, whatever was encoded
    for _ in range(2):
        encoder.encode_image(image)
    keys.update(weights_of(encoder, keys))
    buffers = {f"encoder.{name}": x for name, x in encoder.named_buffers() if name in encoder.state_dict()}
    assert len(buffers) == 3 * sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in encoder.modules())
    for name, buffer in buffers.items():
        assert keys.state()[name].equal(buffer) and not buffer.equal(start[name]), name
    assert keys.state()["encoder.visual.bn1.num_batches_tracked"] == 2


# State, digest, devices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_state_is_the_saved_one_and_shares_no_memory(dtype: torch.dtype, make_encoder) -> None:
    encoder = make_encoder("resnet")
    first = MomentumEncoder(encoder, BOTH, 0.9, dtype=dtype)
    second = MomentumEncoder(move(encoder), BOTH, 0.9, dtype=dtype)
    first.update(weights_of(encoder, first))
    assert first.digest() != second.digest()
    second.load(first.state())
    assert_same(second.state(), first.state())
    assert first.digest() == second.digest()
    image, token = make_batch()
    assert second.encode_image(image).equal(first.encode_image(image))
    assert second.encode_text(token).equal(first.encode_text(token))
    kept = copy.deepcopy(second.state())
    first.update(weights_of(move(encoder), first))
    assert_same(second.state(), kept)


def test_a_copy_shares_no_memory_with_the_encoder(make_encoder) -> None:
    encoder = make_encoder("resnet")
    keys = MomentumEncoder(encoder, BOTH)
    before = copy.deepcopy(keys.state())
    move(encoder)
    assert_same(keys.state(), before)


@pytest.mark.parametrize("head", ["momentum", "live"])
def test_the_digest_sees_every_weight_and_no_buffer(head: str, make_encoder) -> None:
    keys = MomentumEncoder(make_encoder("resnet"), BOTH, head=head)
    expected = int(keys.digest())
    for name, tensor in keys.state().items():
        kept = tensor.clone()
        tensor.view(-1)[-1] += 1
        assert (int(keys.digest()) == expected) == ("running" in name or "tracked" in name), name
        tensor.copy_(kept)


def test_what_is_not_the_whole_encoder_is_refused(make_encoder) -> None:
    encoder = make_encoder()
    keys = MomentumEncoder(encoder, BOTH)
    whole = list(weights_of(encoder, keys))
    name, weight = whole[0]
    for wrong, error in (
        (whole[1:], f"no weights for {name}"),
        ([*whole, whole[0]], "came twice"),
        ([*whole, ("encoder.logit_scale", torch.zeros(1))], "logit_scale is not among"),
        ([(name, weight[:0]), *whole[1:]], "has shape"),
    ):
        for take in (keys.start, keys.update, lambda pairs: keys.load(_Pairs(pairs))):
            with pytest.raises(ValueError, match=error):
                take(iter(wrong))
    with pytest.raises(TypeError, match=r"bfloat16; an average wants torch\.float32"):
        keys.update([(name, weight.bfloat16()), *whole[1:]])


class _Pairs(dict):
    """A state whose items may repeat."""

    def __init__(self, pairs) -> None:
        super().__init__()
        self.pairs = list(pairs)

    def items(self):
        return iter(self.pairs)


@pytest.mark.parametrize("momentum", [-0.1, 1.1])
def test_a_momentum_outside_0_and_1_is_refused(momentum: float, make_encoder) -> None:
    with pytest.raises(ValueError, match=r"in 0\.\.1"):
        MomentumEncoder(make_encoder(), BOTH, momentum)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_start_moves_to_the_device_of_the_weights(dtype: torch.dtype, make_encoder) -> None:
    encoder = make_encoder("resnet")
    keys = MomentumEncoder(encoder, BOTH, dtype=dtype)
    encoder.to("meta")
    keys.start(weights_of(encoder, keys))
    keys.update(weights_of(encoder, keys))
    image, token = (x.to("meta") for x in make_batch())
    assert keys.encode_image(image).device == keys.encode_text(token).device == torch.device("meta")
    assert all(x.is_meta for x in keys.state().values())
    assert {x.dtype for n, x in keys.state().items() if "tracked" not in n} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("error")
def test_it_is_built_and_run_on_fake_tensors(dtype: torch.dtype, architectures: dict[str, str]) -> None:
    """As the dry run does."""
    with torch.device("meta"):
        encoder = build(architectures["resnet"], (64, 32))
    with FakeTensorMode(allow_non_fake_inputs=True):
        encoder.to_empty(device="cpu")
        keys = MomentumEncoder(encoder, BOTH, dtype=dtype, head="live")
        image = keys.encode_image(torch.zeros(4, 3, 64, 32, dtype=torch.uint8))
        assert image.shape == keys.encode_text(torch.zeros(4, 8, dtype=torch.int64)).shape == (4, 12)
        keys.update(weights_of(encoder, keys))
