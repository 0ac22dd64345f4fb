"""Chance: the floor that every selector must beat."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from .rank import Static


@dataclass(frozen=True)
class Random(Static):
    """Blocks drawn without replacement, for each layer, chunk, head and query block anew.

    The same for all videos of a batch and all denoising steps of a chunk, and on every device.

    Attributes:
        seed: of the draw.
    """

    seed: int = 0

    name: ClassVar[str] = "random"
    notes: ClassVar[str] = "Uniform draw, fixed over the steps of a chunk."
    needs_grid: ClassVar[bool] = False

    def key(self, geometry):
        """The layer and the chunk, too."""
        return replace(geometry.static(), layer=geometry.layer, chunk=geometry.chunk)

    def costs(self, geometry, heads):
        """Numbers in [0, 1), ``[H, R, J]``."""
        draw = np.random.default_rng([self.seed, geometry.layer, geometry.chunk])
        return draw.random((heads, geometry.rows, geometry.blocks))
