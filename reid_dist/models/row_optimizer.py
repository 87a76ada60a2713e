"""Adam, AdamW and SGD of some rows of a matrix, the others untouched: for classifiers of which a step sees a sample.

With all rows in every step it is torch's optimizer of the same name. Below that a row is trained as if only the steps
that saw it had been: momentum, weight decay and Adam's bias correction count its own steps. (By the steps of the whole
run a row's first step, if late, would be three times Adam's with betas .9 and .999: .1 / sqrt(.001).)

Shape suffixes: S rows, D columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class RowOptimizer:
    """Settings, as torch's optimizers have them.

    `adamw`: Loshchilov & Hutter 2019, decay beside the gradient; `adam`: Kingma & Ba 2015, decay as an L2 term in it;
    `sgd`: with momentum, decay as an L2 term.
    """

    name: Literal["adamw", "adam", "sgd"]
    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9

    @property
    def moments(self) -> int:
        """Tensors of the weights' shape that the optimizer keeps."""
        return 1 if self.name == "sgd" else 2

    def update(
        self, weight_SD: Tensor, gradient_SD: Tensor, moments: Sequence[Tensor], steps_S: Tensor, factor: float
    ) -> None:
        """One step of these rows, in place; without gradient tracking.

        Args:
            weight_SD: Shape: (S, D).
            gradient_SD: changed too. Shape: (S, D).
            moments: zeros before a row's first step. Shapes: (S, D).
            steps_S: steps of each row before this one; counted up. Shape: (S,).
            factor: of the learning rate.
        """
        lr = self.lr * factor
        steps_S += 1
        if self.name == "adamw":
            weight_SD.mul_(1 - lr * self.weight_decay)
        elif self.weight_decay:
            gradient_SD.add_(weight_SD, alpha=self.weight_decay)
        if self.name == "sgd":
            weight_SD.sub_(moments[0].mul_(self.momentum).add_(gradient_SD), alpha=lr)
            return
        mean_SD, square_SD = moments
        mean_SD.lerp_(gradient_SD, 1 - self.betas[0])
        square_SD.mul_(self.betas[1]).addcmul_(gradient_SD, gradient_SD, value=1 - self.betas[1])
        mean_bias_S1, square_bias_S1 = ((1 - beta ** steps_S.double())[:, None] for beta in self.betas)
        divisor_SD = square_SD.sqrt().div_(square_bias_S1.sqrt().to(weight_SD.dtype)).add_(self.eps)
        weight_SD.addcdiv_(mean_SD * (-lr / mean_bias_S1).to(weight_SD.dtype), divisor_SD)
