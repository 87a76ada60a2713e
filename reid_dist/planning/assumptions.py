"""What a plan assumes of machines and data that are not there: printed with it, and each replaced by `--plan-set`."""

import difflib
import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, ValidationError

from reid_dist.config import Section
from reid_dist.errors import UserError
from reid_dist.planning.links import H100_NODES, Links

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Assumptions(Section):
    """Of a GPU, of the network and of the data; the defaults are an H100 or H200 and JPEGs of people."""

    bf16_tflops: Rate = Field(H100_NODES.tflops, description="TFLOP/s of large matrix products in bf16")
    fp32_tflops: Rate = Field(50.0, description="the same in fp32, without TF32")
    memory_gbs: Rate = Field(3000.0, description="GB/s between a GPU and its memory, reading and writing together")
    utilisation: Annotated[float, Field(gt=0, le=1)] = Field(0.5, description="share of these that a step reaches")
    operation_us: Rate = Field(8.0, description="least time of one operation: its launch")
    near_gbs: Rate = Field(H100_NODES.near_gbs, description="GB/s for each GPU inside a node")
    far_gbs: Rate = Field(H100_NODES.far_gbs, description="GB/s for each GPU between nodes")
    near_us: Rate = Field(H100_NODES.near_us, description="latency of a step of a collective inside a node")
    far_us: Rate = Field(H100_NODES.far_us, description="the same between nodes")
    sample_kb: Rate = Field(40.0, description="kB of a sample in a tar, where no manifest tells")

    def links(self, node: int) -> Links:
        """Between GPUs, `node` of them in each node."""
        return Links(node, self.near_us, self.far_us, self.near_gbs, self.far_gbs)

    def text(self) -> str:
        """All of them as they would be typed."""
        return " ".join(f"{name}={value:g}" for name, value in self.model_dump().items())


def read_assumptions(settings: Sequence[str]) -> Assumptions:
    """The assumptions with some replaced.

    Args:
        settings: `key=value` each.

    Raises:
        UserError: another form, an unknown key, or a value that is out of range.
    """
    given: dict[str, str] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--plan-set {text}: wants key=value, such as utilisation=0.4")
        if key not in Assumptions.model_fields:
            near = difflib.get_close_matches(key, list(Assumptions.model_fields), n=1, cutoff=0.5)
            known = ", ".join(Assumptions.model_fields)
            raise UserError(f"--plan-set {text}: {f'did you mean {near[0]}?' if near else f'known: {known}'}")
        given[key] = value
    try:
        return Assumptions.model_validate(given)
    except ValidationError as error:
        problem = error.errors()[0]
        key = str(problem["loc"][0])
        raise UserError(f"--plan-set {key}={given[key]}: {problem['msg']}") from error


def read_cluster(text: str) -> tuple[int, int]:
    """Nodes and GPUs of each from `8x4`.

    Raises:
        UserError: another form, or none of one of them.
    """
    found = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,3})", text.strip())
    if found is None:
        raise UserError(f"--plan {text}: wants nodes x GPUs of each, such as 8x8, or 1x2")
    return int(found[1]), int(found[2])
