"""Every arm and every claim."""

from collections.abc import Sequence

from reid_dist.claims import conflicts, prompts, words
from reid_dist.claims.arms import Arm, Claim
from reid_dist.errors import UserError

ARMS: dict[str, Arm] = {**conflicts.ARMS, **prompts.ARMS, **words.ARMS}
CLAIMS: tuple[Claim, ...] = (*conflicts.CLAIMS, *prompts.CLAIMS, *words.CLAIMS)
# What stands for models that others trained: run first, and counted for no arm. All are of equal length.
SHARED = ("base", "base-vit", "i2i-scratch")


def find_claims(names: Sequence[str]) -> list[Claim]:
    """The claims of these names, in the order of the matrix; all for none.

    Raises:
        UserError: an unknown name.
    """
    known = [claim.name for claim in CLAIMS]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--only {','.join(unknown)}: no such claim; there are {', '.join(known)}")
    return [claim for claim in CLAIMS if not names or claim.name in names]
