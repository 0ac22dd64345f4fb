"""The best that any list of this length can do: blocks by their true attention mass."""

from dataclasses import dataclass
from typing import ClassVar

from .exact import block_mass
from .rank import Scored


@dataclass(frozen=True)
class Oracle(Scored):
    """Top blocks by the exact softmax mass that a query block's rows give them.

    Costs more than dense attention: a yardstick, not a method.
    """

    name: ClassVar[str] = "oracle"
    notes: ClassVar[str] = "Needs the dense attention that it would save."

    def scores(self, q, k, geometry):
        """The mass, ``[B, H, R, J]`` float32."""
        return block_mass(
            q,
            k,
            frame_tokens=geometry.frame_tokens,
            block_q=geometry.block_q,
            block_k=geometry.block_k,
            scale=geometry.scale,
        )
