"""Groups of key blocks that are ranked as one: frames, places, cubes."""

from __future__ import annotations

from typing import Any

import numpy as np

from .base import Geometry
from .placed import device_cache, placed
from .rank import ranking

KINDS = ("temporal", "spatial", "cube")


def groups_of(geometry: Geometry, kind: str, frames: int = 1) -> np.ndarray:
    """int64 ``[J]``: the group of every key block.

    ``temporal``: all blocks of ``frames`` frames; ``spatial``: a block's place through all frames;
    ``cube``: a place through ``frames`` frames. Frames are counted from the oldest resident one.
    """
    frame, place = geometry.block_frames, np.arange(geometry.blocks) % geometry.per_frame
    if kind == "temporal":
        return frame // frames
    return place if kind == "spatial" else frame // frames * geometry.per_frame + place


@device_cache(maxsize=64)
def grouping(geometry: Geometry, kind: str, frames: int, device: Any) -> tuple[Any, Any]:
    """Two tensors on ``device``, made once for a :meth:`Geometry.static`.

    Returns:
        :func:`groups_of`, int64 ``[J]``; and float32 ``[M, J]`` with which a product gives the
        token-weighted mean of each group's block means.
    """
    import torch

    groups = groups_of(geometry, kind, frames)
    sizes = np.full(geometry.per_frame, geometry.block_k)
    sizes[-1] = geometry.frame_tokens - geometry.block_k * (geometry.per_frame - 1)
    weights = np.zeros((groups.max() + 1, geometry.blocks), np.float32)
    weights[groups, np.arange(geometry.blocks)] = np.tile(sizes, geometry.k_frames)
    weights /= weights.sum(1, keepdims=True)
    return tuple(placed(torch.from_numpy(x), device) for x in (groups, weights))


def by_group(group_scores: Any, block_scores: Any, groups: Any) -> tuple[Any, Any]:
    """Blocks of the best group first, within a group by their own score.

    Args:
        group_scores: ``[B, H, R, M]``.
        block_scores: ``[B, H, R, J]``.
        groups: int64 ``[J]``, the group of each block.

    Returns:
        Blocks from best to worst, ``[B, H, R, J]``; and the rank of each group, ``[B, H, R, M]``.
    """
    import torch

    order = ranking(group_scores)
    rank = torch.empty_like(order)
    rank.scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
    blocks = ranking(block_scores)
    outer = rank.gather(-1, groups[blocks]).sort(dim=-1, stable=True).indices
    return blocks.gather(-1, outer), rank
