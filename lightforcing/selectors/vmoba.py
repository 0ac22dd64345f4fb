"""VMoBA (arXiv 2506.23858): blocks of frames, of places and of cubes, layer by layer in turn."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .groups import KINDS, by_group, grouping, groups_of
from .placed import device_cache, placed
from .rank import Scored, as_torch, block_means, first, take
from .tiles import touched


@dataclass(frozen=True)
class Vmoba(Scored):
    """Top macro-blocks by query times mean key; which macro-blocks there are rotates over layers.

    ``temporal``: all of ``frames[0]`` frames; ``spatial``: one key block's place through all
    frames; ``cube``: one place through ``frames[1]`` frames. The macro-blocks that the query block
    lies in come first.

    Attributes:
        mode: ``topk``: macro-blocks in order until the schedule's count is met, of the last one
            the best key blocks. ``threshold``: as the source by default, macro-blocks in order
            until their min-max normalised scores reach ``threshold`` of the sum of all.
        threshold: 0.25 in the source.
        frames: of a temporal macro-block and of a cube.
    """

    mode: str = "topk"
    threshold: float = 0.25
    frames: tuple[int, int] = (2, 3)

    name: ClassVar[str] = "vmoba"
    notes: ClassVar[str] = (
        "The mean of a query block chooses, not each query token; macro-blocks are unions of key "
        "blocks (cells of 3x4 and 4x6x4 tokens in the source), the last one kept in part."
    )

    def __post_init__(self):
        """Check the mode; a tuple, so that it can be a key."""
        object.__setattr__(self, "frames", tuple(self.frames))
        if self.mode not in ("topk", "threshold"):
            raise ValueError(f"mode: expected topk or threshold, got {self.mode!r}")

    @property
    def exact(self):
        """Only top-k keeps the schedule's count."""
        return self.mode == "topk"

    def select(self, q, k, geometry):
        """See :class:`lightforcing.selectors.Selector`."""
        import torch

        tq, tk = as_torch(q), as_torch(k)
        kind = KINDS[geometry.layer % len(KINDS)]
        frames = self.frames[1] if kind == "cube" else self.frames[0]
        groups, weights = grouping(geometry.static(), kind, frames, tq.device)
        mine = _own(geometry.static(), kind, frames, tq.device)
        qm = block_means(tq, geometry.block_q)
        km = block_means(tk, geometry.block_k, geometry.frame_tokens)
        scores = qm @ (weights @ km).mT
        low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
        scores = (scores - low) / (high - low).clamp_min(1e-12)
        order, rank = by_group(torch.where(mine, scores + 2, scores), qm @ km.mT, groups)
        if self.mode == "topk":
            return take(order, geometry, q)
        sums = torch.zeros_like(scores).scatter_(-1, rank, scores).cumsum(-1)
        macros = (sums < self.threshold * sums[..., -1:]).sum(-1) + 1
        counts = (rank[..., groups] < macros[..., None]).sum(-1)
        return first(order, counts, geometry, q)


@device_cache(maxsize=64)
def _own(geometry, kind, frames, device):
    """Bool ``[R, M]``: the macro-blocks that each query block lies in."""
    import torch

    groups = groups_of(geometry, kind, frames)
    last = groups[geometry.past * geometry.per_frame :]
    own = np.zeros((geometry.rows, groups.max() + 1), bool)
    for row, blocks in enumerate(touched(geometry)):
        own[row, last[blocks]] = True
    return placed(torch.from_numpy(own), device)
