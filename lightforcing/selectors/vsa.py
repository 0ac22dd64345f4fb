"""Video Sparse Attention (arXiv 2505.13389), its fine branch: top cubes of pooled scores."""

from dataclasses import dataclass

from .groups import by_group, grouping
from .rank import Scored, as_torch, block_means, mean_scores, take


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
        return mean_scores(q, k, geometry)

    def select(self, q, k, geometry):
        """See :class:`lightforcing.selectors.Selector`."""
        if self.frames == 1:
            return super().select(q, k, geometry)
        tq, tk = as_torch(q), as_torch(k)
        groups, weights = grouping(geometry.static(), "cube", self.frames, tq.device)
        qm = block_means(tq, geometry.block_q)
        km = block_means(tk, geometry.block_k, geometry.frame_tokens)
        order, _ = by_group(qm @ (weights @ km).mT, qm @ km.mT, groups)
        return take(order, geometry, q)
