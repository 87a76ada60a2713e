"""The one-way GRU against its equations in float64, and one thread against several."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from reid_dist.models.gru import OneWayGRU, reverse_words


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def make(features: int = 3, hidden: int = 4, seed: int = 0) -> OneWayGRU:
    torch.manual_seed(seed)
    return OneWayGRU(features, hidden)


def by_hand(gru: OneWayGRU, x_BLF: Tensor) -> Tensor:
    """Reset, update and new gate (torch's documentation of nn.GRU), step by step, without biases."""
    input_weight, hidden_weight = gru.weight_ih_l0.double(), gru.weight_hh_l0.double()
    state_BH = torch.zeros(len(x_BLF), gru.hidden_size, dtype=torch.float64)
    states = []
    for x_BF in x_BLF.double().unbind(1):
        reset_x, update_x, new_x = (x_BF @ input_weight.T).chunk(3, dim=1)
        reset_h, update_h, new_h = (state_BH @ hidden_weight.T).chunk(3, dim=1)
        reset, update = torch.sigmoid(reset_x + reset_h), torch.sigmoid(update_x + update_h)
        state_BH = (1 - update) * torch.tanh(new_x + reset * new_h) + update * state_BH
        states.append(state_BH)
    return torch.stack(states, dim=1)


def test_states_and_gradients_are_those_of_the_equations(threads: int) -> None:
    gru = make()
    x_BLF = torch.randn(5, 7, 3, requires_grad=True)
    states_BLH = gru(x_BLF)
    expected = by_hand(gru, x_BLF)
    torch.testing.assert_close(states_BLH.double(), expected, rtol=1e-5, atol=1e-6)
    weight = torch.randn_like(states_BLH)
    wanted = (x_BLF, *gru.parameters())
    found = torch.autograd.grad((states_BLH * weight).sum(), wanted)
    for gradient, exact in zip(found, torch.autograd.grad((expected * weight).sum(), wanted), strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-6)


def test_there_are_no_biases() -> None:
    assert {name: tuple(p.shape) for name, p in make(3, 4).named_parameters()} == {
        "weight_ih_l0": (12, 3),
        "weight_hh_l0": (12, 4),
    }


def test_gradcheck(threads: int) -> None:
    gru = make(2, 3).double()
    x_BLF = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: gru(x), (x_BLF, *gru.parameters()))


def test_two_threads_change_no_bit_and_come_back() -> None:
    gru, x_BLF = make(8, 16), torch.randn(6, 9, 8, requires_grad=True)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        states_BLH = gru(x_BLF)
        found = torch.autograd.grad(states_BLH.square().sum(), (x_BLF, *gru.parameters()))
        with torch.no_grad():
            results.append([states_BLH.detach(), gru(x_BLF), *found])
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def test_frozen_weights_and_frozen_inputs_get_no_gradient(threads: int) -> None:
    gru = make()
    gru.weight_hh_l0.requires_grad_(False)
    gru(torch.randn(2, 3, 3)).sum().backward()
    assert gru.weight_hh_l0.grad is None and gru.weight_ih_l0.grad is not None
    assert not gru.requires_grad_(False)(torch.randn(2, 3, 3)).requires_grad


def test_gradients_can_be_asked_for_twice(threads: int) -> None:
    gru, x_BLF = make(), torch.randn(2, 3, 3)
    loss = gru(x_BLF).square().sum()
    first = torch.autograd.grad(loss, tuple(gru.parameters()), retain_graph=True)
    assert all(a.equal(b) for a, b in zip(first, torch.autograd.grad(loss, tuple(gru.parameters())), strict=True))


def test_a_bf16_gru_takes_what_autocast_left_in_fp32(threads: int) -> None:
    gru = make().bfloat16()
    states_BLH = gru(torch.randn(2, 3, 3))
    assert states_BLH.dtype == torch.bfloat16
    states_BLH.float().sum().backward()
    assert gru.weight_ih_l0.grad is not None


def test_reversing_turns_words_around_and_leaves_padding() -> None:
    x_BLF = torch.arange(1, 11).view(2, 5, 1)
    reversed_BLF = reverse_words(x_BLF, torch.tensor([3, 5]))
    assert reversed_BLF[:, :, 0].tolist() == [[3, 2, 1, 4, 5], [10, 9, 8, 7, 6]]
    assert reverse_words(x_BLF, torch.tensor([0, 1])).equal(x_BLF)
    generator = torch.Generator().manual_seed(0)
    x_BLF, length_B = torch.randn(9, 6, 2, generator=generator), torch.randint(0, 7, (9,), generator=generator)
    assert reverse_words(reverse_words(x_BLF, length_B), length_B).equal(x_BLF)
