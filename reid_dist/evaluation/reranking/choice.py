"""The re-rankings that an evaluation may add to plain cosine, each with parameters that its rows print."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from reid_dist.errors import UserError
from reid_dist.evaluation.ranking import Retrieval
from reid_dist.evaluation.reranking.k_reciprocal import k_reciprocal
from reid_dist.evaluation.reranking.neighbour_jaccard import neighbour_jaccard

MOST_WEIGHT = 1000  # far beyond where the cosine, from -1 to 1, decides anything but ties of the Jaccard index


@dataclass(frozen=True)
class NeighbourJaccard:
    """TextReID's: neighbours that query and gallery entry share add to their similarity; see `neighbour_jaccard`.

    Attributes:
        neighbours: of each.
        weight: of their Jaccard index; from 0 to `MOST_WEIGHT`.

    Raises:
        ValueError: less than one neighbour, or another weight.
    """

    name: ClassVar[str] = "jaccard"
    neighbours: int = 5
    weight: float = 0.05

    def __post_init__(self) -> None:
        if self.neighbours < 1 or not 0 <= self.weight <= MOST_WEIGHT:
            raise ValueError(f"neighbours must be >= 1 and weight a number >= 0 and <= {MOST_WEIGHT}")

    @property
    def label(self) -> str:
        """Name and parameters, as tables print them."""
        return _label(self)

    def apply(self, retrieval: Retrieval) -> Retrieval:
        """The same queries and gallery with the similarity of the re-ranking."""
        return neighbour_jaccard(retrieval, self.neighbours, self.weight)


@dataclass(frozen=True)
class KReciprocal:
    """Zhong et al. 2017: Jaccard distance of the weights of k-reciprocal neighbours; see `k_reciprocal`.

    Attributes:
        k1: neighbours.
        k2: neighbours averaged over, itself among them.
        weight: of the original distance (the paper's lambda).

    Raises:
        ValueError: k1 or k2 below one, or a weight outside 0 to 1.
    """

    name: ClassVar[str] = "k_reciprocal"
    k1: int = 20
    k2: int = 6
    weight: float = 0.3

    def __post_init__(self) -> None:
        if self.k1 < 1 or self.k2 < 1 or not 0 <= self.weight <= 1:
            raise ValueError("k1 and k2 must be >= 1 and weight from 0 to 1")

    @property
    def label(self) -> str:
        """Name and parameters, as tables print them."""
        return _label(self)

    def apply(self, retrieval: Retrieval) -> Retrieval:
        """The same queries and gallery with the similarity of the re-ranking."""
        return k_reciprocal(retrieval, self.k1, self.k2, self.weight)


Reranking = NeighbourJaccard | KReciprocal
RERANKINGS: dict[str, type[NeighbourJaccard] | type[KReciprocal]] = {
    kind.name: kind for kind in (NeighbourJaccard, KReciprocal)
}


def _label(reranking: Reranking) -> str:
    return f"{reranking.name}({', '.join(f'{key}={value}' for key, value in asdict(reranking).items())})"


def describe_reranking(reranking: Reranking | None) -> dict[str, Any] | None:
    """Name and parameters for a JSON file; None for plain cosine."""
    return None if reranking is None else {"name": reranking.name, **asdict(reranking)}


def parse_reranking(text: str) -> Reranking:
    """A re-ranking as the command line names it: `jaccard`, `k_reciprocal`, `k_reciprocal:k1=50,k2=15,weight=0.3`.

    Raises:
        UserError: an unknown name or parameter, or a number that cannot be.
    """
    name, _, settings = text.partition(":")
    if name not in RERANKINGS:
        raise UserError(f"--rerank {text}: no re-ranking {name!r}; known: {', '.join(RERANKINGS)}")
    kind = RERANKINGS[name]
    defaults = asdict(kind())
    given: dict[str, Any] = {}
    for part in filter(None, settings.split(",")):
        key, _, value = part.partition("=")
        if key not in defaults or key in given:
            raise UserError(f"--rerank {text}: {name} takes each of {', '.join(defaults)} once, not {key!r}")
        try:
            given[key] = type(defaults[key])(value)
        except ValueError:
            raise UserError(f"--rerank {text}: {key} is a number like {defaults[key]}, not {value!r}") from None
    try:
        return kind(**given)
    except ValueError as error:
        raise UserError(f"--rerank {text}: {error}") from None
