"""How long collectives of many ranks take: a latency for each step of them, and a bandwidth."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Links:
    """Of the machine. The defaults are those of 8 GPUs of the H100 class a node (kernel.md, section 5).

    Attributes:
        node: GPUs of a node.
        near_us, far_us: latency of a step of a collective inside a node and across nodes.
        near_gbs, far_gbs: GB/s for each GPU.
        tflops: of a GPU's matrix products.
    """

    node: int = 8
    near_us: float = 3.0
    far_us: float = 12.0
    near_gbs: float = 360.0
    far_gbs: float = 45.0
    tflops: float = 790.0

    def latency_ms(self, world: int) -> float:
        """Of one step."""
        return (self.near_us if world <= self.node else self.far_us) / 1e3

    def transfer_ms(self, world: int, sent: float) -> float:
        """Of bytes that a rank sends."""
        return sent / (self.near_gbs if world <= self.node else self.far_gbs) / 1e6

    def collective_ms(self, world: int, sent: float) -> float:
        """Of a collective in which each rank sends so many bytes."""
        return math.log2(world) * self.latency_ms(world) + self.transfer_ms(world, sent)


H100_NODES = Links()
