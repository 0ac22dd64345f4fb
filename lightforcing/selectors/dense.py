"""Everything: what the lists themselves cost, and the check that a full list is dense."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .rank import Static


@dataclass(frozen=True)
class Dense(Static):
    """All key blocks for every query block, whatever the schedule says."""

    name: ClassVar[str] = "dense"
    notes: ClassVar[str] = "All blocks by a full list; the schedule's count is ignored."
    needs_grid: ClassVar[bool] = False
    exact: ClassVar[bool] = False

    def own(self, geometry):
        """All True."""
        return np.ones((geometry.rows, geometry.blocks), bool)
