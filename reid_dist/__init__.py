"""reid_dist: distributed training of one vision encoder for image and text queries in person re-identification.

As a library: `from reid_dist import load`; see `reid_dist.trained`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reid_dist.trained import TrainedModel, load

__all__ = ["TrainedModel", "load"]


def __getattr__(name: str) -> Any:
    """What the package offers is imported when it is asked for: training and sharding need none of it."""
    if name in __all__:
        from reid_dist import trained

        return getattr(trained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
