"""Video Sparse Attention (arXiv 2505.13389), its fine branch: top cubes of pooled scores."""

from dataclasses import dataclass

import numpy as np

from .rank import Scored, as_torch, block_means, by_group, first, group_means


@dataclass(frozen=True)
class Cubes(Scored):
    """Top cubes by mean query times mean key; a cube is one key block in some frames in a row.

    Whole cubes in the order of their scores; of the last one that fits only in part the best
    blocks.

    Attributes:
        frames: frames of a cube. 1: a cube is a key block, 64 tokens as in the source.
    """

    frames: int = 1

    @property
    def name(self):
        """``vsa``, or ``vsa-cube`` with more than one frame."""
        return "vsa" if self.frames == 1 else "vsa-cube"

    @property
    def notes(self):
        """What of the source this is."""
        return (
            "Gate 0, so the pooled branch only ranks; its softmax cannot change a row's ranking. "
            f"Cubes of {self.frames} frame{'s' * (self.frames > 1)} x one key block, since 4x4x4 "
            "does not divide a chunk of 3."
        )

    def scores(self, q, k, geometry):
        """Pooled products, block by block."""
        return self._products(q, k, geometry)[0]

    def select(self, q, k, geometry):
        """See :class:`lightforcing.selectors.Selector`."""
        import torch

        from .rank import head_counts

        if self.frames == 1:
            return super().select(q, k, geometry)
        scores, qm, km = self._products(as_torch(q), as_torch(k), geometry)
        groups = torch.from_numpy(
            geometry.block_frames // self.frames * geometry.per_frame
            + np.arange(geometry.blocks) % geometry.per_frame
        ).to(scores.device)
        order, _ = by_group(qm @ group_means(km, geometry, groups).mT, scores, groups)
        counts = head_counts(geometry, scores.shape[1], scores.device)
        if counts is None:
            counts = torch.tensor([geometry.kept] * scores.shape[1], device=scores.device)
        counts = counts[:, None].expand(scores.shape[:3])
        return first(order, counts, geometry, q)

    def _products(self, q, k, geometry):
        qm = block_means(q, geometry.block_q)
        km = block_means(k, geometry.block_k, geometry.frame_tokens)
        return qm @ km.mT, qm, km
