"""Sliding Tile Attention (arXiv 2502.04507): a window of tiles around the query's own."""

from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

import numpy as np

from .rank import Static
from .tiles import over_touched, tiles


@dataclass(frozen=True)
class SlidingTile(Static):
    """The key tiles in a window of frames, rows and columns whose centre stops at the borders.

    A tile here is a key block: a tile of one frame in Morton order, a run of rows in raster order.
    A query block that lies in several tiles takes the union of their windows. Causal form: the
    window in time is the last ``window[0]`` resident frames, the chunk's own included.

    Attributes:
        window: frames, tile rows and tile columns. With ``fit`` only their ratios matter.
        sink_frames: first frames seen through the same window in space, as if they were near.
        fit: grow the window until it holds the schedule's count; False takes it as given, with
            as many blocks as it holds.
    """

    window: tuple[float, float, float] = (6, 3, 3)
    sink_frames: int = 0
    fit: bool = True

    name: ClassVar[str] = "sta"
    notes: ClassVar[str] = (
        "One window for all heads, grown to the budget (the source searches one per head, layer "
        "and step); tiles are key blocks of one frame instead of 6x8x8 tokens."
    )

    def __post_init__(self):
        """A tuple, so that it can be a key."""
        window = tuple(self.window) if isinstance(self.window, (tuple, list)) else ()
        good = len(window) == 3 and all(isinstance(w, Real) and w > 0 for w in window)
        if not good:
            raise ValueError(f"window: expected three numbers above 0, got {self.window!r}")
        object.__setattr__(self, "window", window)

    @property
    def exact(self):
        """Only a fitted window keeps the schedule's count."""
        return self.fit

    def costs(self, geometry, heads):
        """The scale of the window that first reaches a block; then the block's distance."""
        frames, rows, columns = self._sizes(geometry)
        far = np.maximum(frames / self.window[0], rows / self.window[1])
        far = np.maximum(far, columns / self.window[2])
        near = frames / self.window[0] + rows / self.window[1] + columns / self.window[2]
        return over_touched(far + 1e-6 * near, geometry)

    def own(self, geometry):
        """The window as given; None with ``fit``."""
        if self.fit:
            return None
        frames, rows, columns = self._sizes(geometry)
        inside = (frames <= self.window[0]) & (rows <= self.window[1])
        return ~over_touched(~(inside & (columns <= self.window[2])), geometry)

    def _sizes(self, geometry):
        """Least window in frames, rows and columns with each (current block, block): 3 arrays."""
        places, count = tiles(geometry)
        ages = geometry.ages + 1
        ages[: min(self.sink_frames, geometry.past)] = 1
        frames = np.repeat(ages, geometry.per_frame)[None, :]
        down, across = (_reach(places[:, axis], count[axis]) for axis in (0, 1))
        repeats = (geometry.q_frames, geometry.k_frames)
        return frames, np.tile(down, repeats), np.tile(across, repeats)


def _reach(places, count):
    """The least width of a clamped window around each place that holds each other place.

    A window of w tiles around tile c is moved so that it stays in [0, count).
    """
    own, other = places[:, None], places[None, :]
    free = 2 * np.abs(own - other) + 1
    # At a border the window stops moving and reaches further to the other side.
    low = np.maximum(2 * own + 1, other + 1)
    high = np.maximum(2 * (count - own) - 1, count - other)
    stopped = np.where(other > own, low, np.where(other < own, high, 1.0))
    return np.minimum(free, stopped)
