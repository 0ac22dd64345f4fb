"""Mass scores from means of fewer tokens than a quarter block: closer to the oracle, dearer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .. import ops
from ..blocks import frame_blocks
from .exact import over_blocks
from .rank import Scored, block_means

SLAB = 64 << 20  # bytes of logits at a time, on a CPU
SLAB_GPU = 1 << 30  # products of a few rows each leave a GPU idle
LEAST = 16  # tokens of the smallest block of select_blocks, which has cells of a quarter


@dataclass(frozen=True)
class Fine(Scored):
    """Top blocks by the attention mass that means of ``cell`` tokens predict.

    The rule of ``mass`` with cells of another size: for each query cell a softmax over all key
    cells of (scale <q, k> + log tokens), summed over a block's cells, weighted by the query cell's
    rows. Logits: Lq Lk / cell^2.

    Attributes:
        cell: tokens of a query cell and of a key cell; None is an eighth of a key block, half of
            what ``mass`` has.
    """

    cell: int | None = None

    name: ClassVar[str] = "mass-fine"
    notes: ClassVar[str] = "Ours."

    def __post_init__(self):
        """Check the cell."""
        if self.cell not in (None, 1, 2, 4, 8, 16, 32):
            raise ValueError(f"cell: expected a power of two up to 32, got {self.cell!r}")

    def scores(self, q, k, geometry):
        """Estimated mass of every key block, float32 ``[B, H, R, J]``.

        Raises:
            ValueError: a block is not whole cells.
        """
        import torch

        g = geometry
        cell = g.block_k // 8 if self.cell is None else self.cell
        if LEAST <= 4 * cell <= g.block_k:
            return _by_select_blocks(q, k, g, 4 * cell)
        if g.block_q % cell or g.block_k % cell:
            raise ValueError(
                f"cell: expected a divisor of block_q = {g.block_q} and block_k = {g.block_k}, "
                f"got {cell}"
            )
        scale = q.shape[3] ** -0.5 if g.scale is None else g.scale
        qm = block_means(q, cell) * scale
        km = block_means(k, cell, g.frame_tokens).mT
        per_frame = km.shape[-1] // g.k_frames
        size = torch.full((per_frame,), float(cell), device=q.device)
        size[-1:].fill_(g.frame_tokens - cell * (per_frame - 1))
        bias = size.log().repeat(g.k_frames)
        rows = qm.shape[2]
        weight = torch.full((rows, 1), float(cell), device=q.device)
        weight[-1:].fill_(float(g.q_len - cell * (rows - 1)))
        cells = g.block_q // cell
        slab = SLAB_GPU if q.is_cuda else SLAB
        step = max(1, slab // (4 * km.shape[-1] * q.shape[0] * q.shape[2] * cells)) * cells
        out = []
        for begin in range(0, rows, step):
            p = (qm[:, :, begin : begin + step] @ km + bias).softmax(-1)
            p = over_blocks(p * weight[begin : begin + step], per_frame, g.block_k // cell)
            full = p.shape[2] // cells * cells
            if full:
                out.append(p[:, :, :full].unflatten(2, (-1, cells)).sum(3))
            if full < p.shape[2]:
                out.append(p[:, :, full:].sum(2, keepdim=True))
        return torch.cat(out, 2)


def _by_select_blocks(q, k, g, block):
    """The scores of smaller blocks, added up: mass is additive, and they have these cells."""
    scores = ops.select_blocks(
        q,
        k,
        frame_tokens=g.frame_tokens,
        sparsity=0.5,
        score="mass",
        hierarchy=False,
        block_q=g.block_q,
        block_k=block,
        scale=g.scale,
        return_scores=True,
    )[1]
    return over_blocks(scores, frame_blocks(g.frame_tokens, block), g.block_k // block)
