"""VMoBA (arXiv 2506.23858): blocks of frames, of places and of cubes, layer by layer in turn."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .rank import Scored, as_torch, block_means, by_group, first, group_means, head_counts
from .tiles import touched

KINDS = ("temporal", "spatial", "cube")


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

    def groups(self, geometry):
        """int64 ``[J]``: the macro-block of every key block in this layer."""
        frame, place = geometry.block_frames, np.arange(geometry.blocks) % geometry.per_frame
        kind = KINDS[geometry.layer % len(KINDS)]
        if kind == "temporal":
            return frame // self.frames[0]
        return place if kind == "spatial" else frame // self.frames[1] * geometry.per_frame + place

    def select(self, q, k, geometry):
        """See :class:`lightforcing.selectors.Selector`."""
        import torch

        tq, tk = as_torch(q), as_torch(k)
        qm = block_means(tq, geometry.block_q)
        km = block_means(tk, geometry.block_k, geometry.frame_tokens)
        groups = torch.from_numpy(self.groups(geometry)).to(tq.device)
        scores = qm @ group_means(km, geometry, groups).mT
        low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
        scores = (scores - low) / (high - low).clamp_min(1e-12)
        own = np.zeros((geometry.rows, scores.shape[-1]), bool)
        last = self.groups(geometry)[geometry.past * geometry.per_frame :]
        for row, blocks in enumerate(touched(geometry)):
            own[row, last[blocks]] = True
        mine = torch.from_numpy(own).to(tq.device)
        order, rank = by_group(torch.where(mine, scores + 2, scores), qm @ km.mT, groups)
        if self.mode == "topk":
            counts = head_counts(geometry, tq.shape[2], tq.device)
            if counts is None:
                counts = torch.full((tq.shape[2],), geometry.kept, device=tq.device)
            counts = counts[:, None].expand(order.shape[:3])
        else:
            sums = torch.zeros_like(scores).scatter_(-1, rank, scores).cumsum(-1)
            short = (sums < self.threshold * sums[..., -1:]).sum(-1) + 1
            counts = (rank[..., groups] < short[..., None]).sum(-1)
        return first(order, counts, geometry, q)
