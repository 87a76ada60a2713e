"""A GRU that reads each caption forwards or backwards and keeps its speed on a CPU with several threads.

Shape suffixes: B batch, L words, F features, H hidden size.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class OneWayGRU(nn.GRU):
    """One layer and direction without biases (Cho et al. 2014; TextReID, Han et al. 2021, section 3.3 of methods.md).

    No packed sequences, whose shapes depend on the data: what stands after the last word cannot reach it, and a caption
    is read backwards by turning its words around (`reverse_words`).
    """

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__(features, hidden, bias=False, batch_first=True)

    def forward(self, x_BLF: Tensor) -> Tensor:  # type: ignore[override]
        """The state after each word, in the weights' precision. Shape: (B, L, F) -> (B, L, H)."""
        weights: list[Tensor] = self._flat_weights  # type: ignore[assignment]
        x_BLF = x_BLF.to(weights[0].dtype)
        if x_BLF.device.type != "cpu" or torch.get_num_threads() == 1:
            return self._states(x_BLF)
        if torch.is_grad_enabled():
            states_BLH: Tensor = _OneThread.apply(x_BLF, *weights)
            return states_BLH
        with _one_thread():
            return self._states(x_BLF)

    def _states(self, x_BLF: Tensor) -> Tensor:
        states_BLH: Tensor = super().forward(x_BLF)[0]
        return states_BLH


class _OneThread(torch.autograd.Function):
    """Forward and backward in one thread: with two, the barriers of the many small steps cost up to 30 times that."""

    @staticmethod
    def forward(ctx: Any, x_BLF: Tensor, *weights: Tensor) -> Tensor:
        """The GRU in a graph of its own, on inputs that share the memory of these."""
        ctx.inputs = [
            tensor.detach().requires_grad_(needed)
            for tensor, needed in zip((x_BLF, *weights), ctx.needs_input_grad, strict=True)
        ]
        zero_1BH = x_BLF.new_zeros(1, len(x_BLF), weights[1].shape[1])
        with _one_thread(), torch.enable_grad():
            # No biases, one layer, no dropout, in training mode, one direction, batch first.
            ctx.states_BLH = torch._VF.gru(ctx.inputs[0], zero_1BH, ctx.inputs[1:], False, 1, 0.0, True, False, True)[0]
        states_BLH: Tensor = ctx.states_BLH.detach()
        return states_BLH

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The graph stays, for those who ask for gradients twice."""
        wanted = [tensor for tensor in ctx.inputs if tensor.requires_grad]
        with _one_thread():
            found = iter(torch.autograd.grad(ctx.states_BLH, wanted, gradients[0], retain_graph=True))
        return tuple(next(found) if tensor.requires_grad else None for tensor in ctx.inputs)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def reverse_words(x_BLF: Tensor, length_B: Tensor) -> Tensor:
    """Turns each caption around and leaves its padding where it is; twice is the identity.

    Args:
        x_BLF: of words. Shape: (B, L, F).
        length_B: words of each caption.
    """
    place_L = torch.arange(x_BLF.shape[1], device=x_BLF.device)
    mirrored_BL = length_B[:, None] - 1 - place_L
    place_BL = torch.where(mirrored_BL >= 0, mirrored_BL, place_L)
    return x_BLF.gather(1, place_BL[:, :, None].expand_as(x_BLF))
