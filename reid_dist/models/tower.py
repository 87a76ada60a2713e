"""What every tower gives.

A tower is called `tower(x)` for features (B, D). Those with `gives_tokens` may be called `tower(x, details=True)` for a
`TowerOutput`. Always call the module itself: ZeRO 3 gathers its weights there.

Shape suffixes: B batch, N tokens, D feature size.
"""

from typing import Any, NamedTuple

from torch import Tensor, nn


class TowerOutput(NamedTuple):
    """Features, not normalised, and what losses on tokens or on image queries want."""

    features: Tensor  # (B, D)
    tokens: Tensor  # (B, N, D), normed and projected: class token and patches, or every word with its padding
    i2i_features: Tensor | None = None  # (B, D), of the token for image queries; None: the tower has none


class Projects:
    """A tower that may end in a further linear map (`model.projection`), which all that it gives passes.

    Around the call and not at the end of each `forward`: what a tower computes stays what its library computes. To be
    named before the module that it is mixed into.
    """

    projection_head: nn.Linear | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Features, or a `TowerOutput`, of the tower or of the map behind it."""
        output = super().__call__(*args, **kwargs)  # type: ignore[misc]  # the module's
        head = getattr(self, "projection_head", None)
        if head is None:
            return output
        if not isinstance(output, TowerOutput):
            return head(output)
        i2i_features = None if output.i2i_features is None else head(output.i2i_features)
        return TowerOutput(head(output.features), head(output.tokens), i2i_features)
