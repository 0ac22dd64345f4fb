"""Where key blocks lie in a frame, for selectors that reason in rows, columns and frames.

With Morton order and a block of 64 tokens a block is an 8 x 8 tile. In raster order it is a run of
64 / columns rows (or a part of one), and stands for a tile of that shape: wide and flat.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .base import Geometry, token_places


def tile_size(geometry: Geometry) -> tuple[float, float]:
    """Rows and columns that a full key block stands for."""
    block, columns = geometry.block_k, geometry.grid[1]
    if geometry.order == "morton":
        bits = block.bit_length() - 1
        return float(2 ** (bits // 2)), float(2 ** (bits - bits // 2))
    return max(1.0, block / columns), float(min(block, columns))


@lru_cache(maxsize=32)
def _tiles(grid, order, block, height, width):
    place = token_places(*grid, order).astype(np.float64)
    starts = np.arange(0, len(place), block)
    sizes = np.diff(np.append(starts, len(place)))
    centre = np.add.reduceat(place, starts, axis=0) / sizes[:, None]
    return (centre - (np.array([height, width]) - 1) / 2) / (height, width)


def tiles(geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every key block of a frame, in tiles.

    Returns:
        float64 ``[blocks of a frame, 2]``, whole numbers where blocks are the tiles of the grid,
        and float64 ``[2]``, tiles down and across.
    """
    height, width = tile_size(geometry)
    places = _tiles(geometry.grid, geometry.order, geometry.block_k, height, width)
    return places, np.array([geometry.grid[0] / height, geometry.grid[1] / width])


def pieces(geometry: Geometry) -> list[tuple[int, int, int, int]]:
    """Query blocks cut at the frames: (query block, query frame, first token, end) in the frame."""
    tokens, out = geometry.frame_tokens, []
    for row in range(geometry.rows):
        begin = row * geometry.block_q
        end = min(begin + geometry.block_q, geometry.q_len)
        while begin < end:
            frame = begin // tokens
            stop = min(end, (frame + 1) * tokens)
            out.append((row, frame, begin - frame * tokens, stop - frame * tokens))
            begin = stop
    return out


def touched(geometry: Geometry) -> np.ndarray:
    """Bool ``[R, f * blocks of a frame]``: the current key blocks that a query block's rows are."""
    out = np.zeros((geometry.rows, geometry.q_frames * geometry.per_frame), bool)
    for row, frame, begin, end in pieces(geometry):
        first = frame * geometry.per_frame
        blocks = slice(begin // geometry.block_k, (end - 1) // geometry.block_k + 1)
        out[row, first + blocks.start : first + blocks.stop] = True
    return out


def over_touched(values: np.ndarray, geometry: Geometry) -> np.ndarray:
    """The least of ``values`` [f * blocks of a frame, J] over each query block's own: [R, J]."""
    own = touched(geometry)
    return np.stack([values[row].min(0) for row in own])
